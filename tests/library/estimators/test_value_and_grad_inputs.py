"""Errors of `value_grad_and_hessian`, which name cause and cure."""

import jax
import jax.numpy as jnp
import pytest
from tanh_model import KEY, PARAMS, W, arguments, close, logits_fn, loss_fn, obj_fn, shared

from sophia_optax import gauss_newton_bartlett, hutchinson
from sophia_optax.estimators.value_and_grad import value_grad_and_hessian

GROUPS = gauss_newton_bartlett(groups=2)


def refuses(match, estimate, error=ValueError, has_aux=False, params=PARAMS, without=(), **changes):
    params = params and jax.tree.map(jnp.asarray, params)
    extra = {n: x for n, x in arguments(dtype="float32")[1].items() if n not in without} | changes
    function = value_grad_and_hessian(estimate, has_aux=has_aux)
    with pytest.raises(error, match=match):
        jax.eval_shape(lambda: function(KEY, params, **extra))


def test_estimators_that_share_nothing_are_refused_at_once():
    with pytest.raises(TypeError, match=r"shares no forward pass.*let `update` c"):
        value_grad_and_hessian(lambda key, params, updates, **extra: updates)


def test_shares_that_do_not_divide_the_rows_are_refused():
    third, idle = ({"batch_fraction": 1 / 3}, {"groups": 3, "parallel_groups": 2})
    for settings in (third, third | idle):
        estimate = gauss_newton_bartlett(**settings)
        refuses(r"batch_fraction=1/3 does not divide the 8 rows.*Choose a fraction", estimate)


def test_missing_arguments_are_named():
    gnb, hutch = gauss_newton_bartlett(), hutchinson()
    refuses("gauss_newton_bartlett needs `loss_fn`.*loss_fn=lambda", gnb, without=["loss_fn"])
    refuses("needs `logits_fn`.*logits_fn=lambda", gnb, without=["logits_fn"])
    refuses("needs `obj_fn`.*obj_fn=lambda", hutch, without=["obj_fn"])
    for estimate in (gnb, hutch):
        refuses("needs `params`", estimate, params=None)
    groups = gauss_newton_bartlett(groups=2)
    refuses("cuts rows from `inputs`, which was not passed", groups, without=["inputs"])


def test_a_sampled_loss_fn_cannot_share():
    loss = lambda params, inputs, key: (0.0, 1)  # noqa: E731
    refuses("a forward pass of its own.*let `update` take", GROUPS, sampled_loss_fn=loss)


@pytest.mark.parametrize(
    ("losses", "has_aux"),
    [
        (lambda f, batch: loss_fn(f, batch).mean(), False),
        (lambda f, batch: loss_fn(f, batch).sum(0), False),
        (lambda f, batch: (loss_fn(f, batch), f), False),
        (lambda f, batch: loss_fn(f, batch), True),
        (lambda f, batch: (loss_fn(f, batch).mean(), f), True),
        (lambda f, batch: 0.0, False),
    ],
    ids=["a mean", "over rows", "a pair", "no pair", "a pair with a mean", "a number"],
)
def test_losses_of_another_form_are_refused(losses, has_aux):
    form = r"\(losses, auxiliary output\) with losses" if has_aux else "losses"
    match = rf"with has_aux={has_aux} `loss_fn` must return {form} float\[4, ...\], but it returned"
    refuses(match + ".*Do not average", GROUPS, has_aux=has_aux, loss_fn=losses)


def test_losses_are_shaped_as_their_weights():
    mean_of_row = lambda f, batch: loss_fn(f, batch).mean(1)  # noqa: E731
    match = r"losses of shape \(8,\), but `weights` has shape \(8, 2\)"
    refuses(match, gauss_newton_bartlett(), loss_fn=mean_of_row, weights=jnp.asarray(W))
    refuses(r"`weights` has shape \(8, 3\)", gauss_newton_bartlett(), weights=jnp.ones((8, 3)))


@pytest.mark.parametrize("aux", [lambda f: f.mean(), lambda f: f[:2]], ids=["a number", "two"])
def test_auxiliary_output_that_belongs_to_no_row_cannot_be_joined(aux):
    pair = lambda f, batch: (loss_fn(f, batch), {"aux": aux(f)})  # noqa: E731
    half = gauss_newton_bartlett(batch_fraction=0.5)
    for estimate, setting in ((GROUPS, "groups=2"), (half, "batch_fraction=0.5")):
        match = f"{setting}.*must lead with the rows of its outputs, here 4"
        refuses(match, estimate, has_aux=True, loss_fn=pair)
    idle = gauss_newton_bartlett(groups=4, parallel_groups=3)
    refuses("lead with the rows of its outputs, here 8", idle, has_aux=True, loss_fn=pair)
    params, extra = arguments(dtype="float32")
    one_group = gauss_newton_bartlett()
    (_, have), *_ = shared(one_group, params, extra | {"loss_fn": pair}, has_aux=True)
    close(have, {"aux": aux(logits_fn(params, extra["inputs"]))}, rtol=1e-5)


def test_an_objective_of_another_form_is_refused():
    pair = lambda params, batch: (obj_fn(params, batch), 0.0)  # noqa: E731
    refuses("nothing else.*Drop the auxiliary output", hutchinson(), TypeError, obj_fn=pair)
    refuses(
        r"must return \(scalar mean loss, aux.*such a pair", hutchinson(), TypeError, has_aux=True
    )

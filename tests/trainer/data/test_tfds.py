"""Data sets as tensorflow_datasets keeps them, written and read here without TensorFlow."""

import struct
import sys

import numpy as np
import pytest
from corpora import DOCUMENTS, loader

from train.data import DataConfig
from train.data.prepare import tfds
from train.data.prepare.records import Broken

REASON = "the extra tfds is not installed"
library = pytest.importorskip("tensorflow_datasets", reason=REASON)
pytest.importorskip("importlib_resources", reason=REASON)
array_record = pytest.importorskip("array_record.python.array_record_module", reason=REASON)


def write(root, kind):
    """Glue/sst2 in two files: a sentence, its class and its number."""
    from tensorflow_datasets.core import example_serializer

    features = library.features.FeaturesDict(
        {
            "sentence": library.features.Text(),
            "label": library.features.ClassLabel(names=["no", "yes"]),
            "idx": library.features.Scalar(np.int32),
        }
    )
    pack = example_serializer.ExampleSerializer(features.get_serialized_info()).serialize_example
    folder = root / "glue" / "sst2" / "2.0.0"
    folder.mkdir(parents=True)
    template = library.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="glue", split="train", filetype_suffix=kind
    )
    for shard in range(2):
        examples = [
            pack(features.encode_example({"sentence": DOCUMENTS[i], "label": i % 2, "idx": i}))
            for i in range(100 * shard, 100 * shard + 100)
        ]
        path = folder / f"glue-train.{kind}-0000{shard}-of-00002"
        if kind == "tfrecord":
            framed = (struct.pack("<Q", len(e)) + b"????" + e + b"????" for e in examples)
            path.write_bytes(b"".join(framed))
        else:
            writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
            for example in examples:
                writer.write(example)
            writer.close()
    library.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            library.core.SplitInfo(
                name="train", shard_lengths=[100, 100], num_bytes=1, filename_template=template
            )
        ],
        filename_template=None,
        check_data=False,
    )
    return folder


@pytest.fixture(params=["tfrecord", "array_record"])
def prepared(request, tmp_path):
    return tmp_path, write(tmp_path, request.param)


def test_a_prepared_data_set_is_the_documents_it_was_made_of(prepared):
    root, _ = prepared
    small = loader(root)
    (root / "all.txt").write_text("<|end|>".join(DOCUMENTS))
    want = small(f"text:{root / 'all.txt'}", separator="<|end|>")
    found = small("tfds:glue/sst2", tfds_folder=str(root))
    assert found.fingerprint == want.fingerprint
    labelled = small("tfds:glue/sst2:train", tfds_folder=str(root), task="classify")
    assert labelled.class_names == ("0", "1")
    batch = labelled.batch(0)
    for row in range(4):
        text = labelled.decode(batch.inputs[row, batch.segments[row] == 0]).strip("\x02\x03")
        assert batch.targets[row] in {i % 2 for i, d in enumerate(DOCUMENTS) if d.startswith(text)}
    assert "tensorflow" not in sys.modules


def test_faults_are_named(prepared):
    root, folder = prepared
    small = loader(root)
    files = sorted(folder.glob("glue-train*"))
    whole = files[1].read_bytes()
    for broken in (whole[:-2], whole[:-9], whole[: len(whole) // 2 + 3], b"\xff" * 999):
        files[1].write_bytes(broken)
        with pytest.raises(Broken, match=r"-00001-of-00002.*--data.broken skip"):
            small("tfds:glue/sst2", tfds_folder=str(root))
    files[1].write_bytes(b"")
    with pytest.raises(Broken, match="00001-of-00002 is empty"):
        small("tfds:glue/sst2", tfds_folder=str(root))
    files[1].unlink()
    with pytest.raises(Broken, match=r"00001-of-00002 is missing: .*not copied as a whole"):
        small("tfds:glue/sst2", tfds_folder=str(root))
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        small("tfds:glue/sst2:test", tfds_folder=str(root))


def test_what_is_not_there_is_fetched_only_if_allowed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tfds:lm1b is not in .*--data\.download"):
        loader(tmp_path)("tfds:lm1b", tfds_folder=str(tmp_path))
    asked = []
    monkeypatch.setattr(tfds, "_download", lambda *args: asked.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loader(tmp_path)("tfds:lm1b", tfds_folder=str(tmp_path), download=True)
    assert asked == [("lm1b", tmp_path)]


def test_the_table_names_features_that_the_data_sets_have():
    pytest.importorskip("tensorflow_datasets.text", reason=REASON)  # registers some of them
    registered = set(library.list_builders(with_community_datasets=False))
    for name in tfds.TEXT:
        assert name.partition("/")[0] in registered
    assert tfds.text_field("wiki40b/en") == "text" and tfds.text_field("my_own") == "text"
    config = DataConfig(source="tfds:glue/mrpc:validation")
    assert tfds.text_field(config.source[5:]) == "sentence1,sentence2"

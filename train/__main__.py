"""`python -m train`."""

import sys

from train.extras import missing


def run() -> None:
    """The command line; without its libraries, a line that names the extra which has them."""
    try:
        from train.cli.main import main

        main()
    except ModuleNotFoundError as error:
        if not (cure := missing(error)):
            raise
        sys.exit(f"error: {cure}")


if __name__ == "__main__":
    run()

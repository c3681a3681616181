"""`python -m train`."""

import sys

from train.extras import missing


def run() -> None:
    """Runs the command line; if its libraries are missing, prints the extra that has them."""
    try:
        from train.cli.main import main

        main()
    except ModuleNotFoundError as error:
        if not (cure := missing(error)):
            raise
        sys.exit(f"error: {cure}")


if __name__ == "__main__":
    run()

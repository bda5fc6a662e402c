import sys

from moetrain.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

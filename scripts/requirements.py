"""Prints the requirements of the extras named on the command line, one a line, as pyproject.toml lists them.

pip can install a project's extras only together with the project, which would compile it.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pip brings a copy into every virtual environment
    from pip._vendor import tomli as tomllib


def main() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    extras = pyproject["project"]["optional-dependencies"]
    print("\n".join(sorted({requirement for name in sys.argv[1:] for requirement in extras[name]})))


if __name__ == "__main__":
    main()

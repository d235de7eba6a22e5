"""The two commands of this project, `demo` and `test`, and a few more: run `python3 dev.py --help`.

Standard library only. This file stays readable for any Python, so that an old one gets a clear answer.
"""

import sys


MINIMUM = (3, 10)

if __name__ == "__main__":
    if sys.version_info < MINIMUM:
        sys.exit(
            "error: this is Python %d.%d and dev.py needs %d.%d or newer: run it with a newer one, for example "
            "'python3.12 dev.py ...' (Debian, Ubuntu: apt-get install python3)." % (sys.version_info[:2] + MINIMUM)
        )

    from devtools.commands import main

    sys.exit(main(sys.argv[1:]))

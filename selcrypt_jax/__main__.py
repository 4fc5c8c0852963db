"""``python -m selcrypt_jax`` is ``selcrypt``."""

import sys

from .cli import main

sys.exit(main())

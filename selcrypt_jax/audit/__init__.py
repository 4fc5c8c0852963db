"""Attacks on protected networks: what an attacker gets, measured.

An attacker has the file, the code, the architecture, perhaps lower keys and some data. How bad the
network is without a key says little. What matters is how good the attacker can make it, compared
with training the bare architecture with the same effort: the `advantage`.
"""

from ._advantage import advantage as advantage
from ._attacks import ATTACKS as ATTACKS
from ._attacks import Attack as Attack
from ._attacks import Loot as Loot
from ._attacks import run_attack as run_attack
from ._cipher import check_cipher as check_cipher
from ._detection import detect as detect
from ._fill import clip_norm as clip_norm
from ._fill import mean_fill as mean_fill
from ._fill import resample as resample
from ._fill import zero_fill as zero_fill
from ._finetune import fine_tune as fine_tune
from ._keysearch import key_search as key_search
from ._structure import Link as Link
from ._subject import Subject as Subject
from ._twofiles import changed as changed
from ._twofiles import merge as merge
from ._twofiles import shared_keystream as shared_keystream
from ._unshuffle import unshuffle as unshuffle

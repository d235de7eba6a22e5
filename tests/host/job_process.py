"""`train.py` as a user runs it, in an environment whose torchvision may lack its operators: job_process.py JOB …"""

import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from devtools import loading  # noqa: E402


loading.tolerate_torchvision()

import train  # noqa: E402


train.main()

"""What every test shares: the files of the study on the path, one thread, and no network."""
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # sums in a fixed order, and no fight over the cores

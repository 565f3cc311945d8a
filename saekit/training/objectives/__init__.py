"""What training asks of an SAE besides its rule: one small file per member of the family.

Every objective is a frozen value that satisfies `Objective`; a new one is a new file, and needs no other.
"""

from saekit.training.objectives.gated import Gated as Gated
from saekit.training.objectives.jumprelu import JumpReLU as JumpReLU
from saekit.training.objectives.l1 import ReLUL1 as ReLUL1
from saekit.training.objectives.matryoshka import Matryoshka as Matryoshka
from saekit.training.objectives.objective import Measured as Measured
from saekit.training.objectives.objective import Objective as Objective
from saekit.training.objectives.reconstruction import Reconstruction as Reconstruction

"""Contrastive losses; they need only torch and numpy."""

from contrast.losses.amcl import AMCL
from contrast.losses.amcl_barlow import AMCLBarlow
from contrast.losses.amcl_cosine import AMCLCosine
from contrast.losses.bad_pairs import BadPairs
from contrast.losses.cacr import CACR
from contrast.losses.cacr_multi_crop import CACRMultiCrop
from contrast.losses.cacr_queue import CACRQueue
from contrast.losses.cacr_rbf import CACRRBF
from contrast.losses.cwcl import CWCL
from contrast.losses.decoupled import DecoupledInfoNCE
from contrast.losses.false_negatives import FalseNegatives
from contrast.losses.hard_contrastive import HardContrastive
from contrast.losses.hard_negative import HardNegative
from contrast.losses.info_nce import InfoNCE
from contrast.losses.loss import LOSSES, Loss, ModuleLoss, as_loss
from contrast.losses.negative_cosine import NegativeCosine
from contrast.losses.pair_loss import PairLoss, Source
from contrast.losses.siglip import SigLIP

__all__ = [
    "AMCL",
    "CACR",
    "CACRRBF",
    "CWCL",
    "LOSSES",
    "AMCLBarlow",
    "AMCLCosine",
    "BadPairs",
    "CACRMultiCrop",
    "CACRQueue",
    "DecoupledInfoNCE",
    "FalseNegatives",
    "HardContrastive",
    "HardNegative",
    "InfoNCE",
    "Loss",
    "ModuleLoss",
    "NegativeCosine",
    "PairLoss",
    "SigLIP",
    "Source",
    "as_loss",
]

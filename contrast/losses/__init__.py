"""Contrastive losses; they need torch and numpy alone."""

from contrast.losses.cacr import CACR
from contrast.losses.info_nce import InfoNCE
from contrast.losses.negative_cosine import NegativeCosine
from contrast.losses.pair_loss import LOSSES, PairLoss, Source

__all__ = ["CACR", "LOSSES", "InfoNCE", "NegativeCosine", "PairLoss", "Source"]

"""The families of backbones, one file each, whose import registers its models with timm, and what they share."""

from arm_zoo.models import arm as arm
from arm_zoo.models import vim as vim
from arm_zoo.models import vmamba as vmamba
from arm_zoo.models._builder import ARCHITECTURES as ARCHITECTURES
from arm_zoo.models._builder import Backbone as Backbone

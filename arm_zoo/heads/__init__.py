"""Heads on the features of any timm model, which stays frozen or is trained with them."""

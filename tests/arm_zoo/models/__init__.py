"""Tests of the families of backbones."""

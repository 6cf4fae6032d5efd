"""What holds for the models of all families."""

import arm_zoo
from arm_zoo.models._builder import ARCHITECTURES


def test_classes_of_models_are_exported() -> None:
    assert {architecture.model_class.__name__ for architecture in ARCHITECTURES.values()} <= set(arm_zoo.__all__)

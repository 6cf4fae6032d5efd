"""Training, from the top of a checkout. The commands, and what they do:

python -m recipes.quickstart                       one label of each class, pretrained or not, in minutes on a CPU
python -m recipes.finetune data.source=FOLDER      train a classifier on your own images, a folder for each class
python -m recipes.pretrain --config FILE           pretrain without labels; recipes/configs has files for both
python -m recipes.dvae --config FILE               train a small dVAE, whose tokens a pretraining can predict
python -m recipes.probe --weights RUN data.source=FOLDER   score frozen features: k-NN, linear, few-shot, ...
python -m recipes.ablate TABLE                     a table of the paper, 4 to 8: every row, for some seeds
python -m recipes.segment data.source=FOLDER ...   train a segmentation head, on images with masks
python -m recipes.digit_scenes FOLDER              images with masks to try that with: digits on two photographs
python -m recipes.cost --run RUN                   hours of pretraining, from a measured speed
python -m recipes.loader_speed data.source=FOLDER  images per second, alone or behind a training step
python -m recipes.kill_test --config FILE          check that a killed run that goes on ends with the same weights

`--help` after any of them lists its options. With several GPUs, `accelerate launch -m` takes the place of `python -m`.
"""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)
    parser.print_help()


if __name__ == "__main__":
    main()

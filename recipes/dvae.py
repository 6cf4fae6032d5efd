"""Training of a small dVAE, whose tokens pretraining can predict instead of pixels (paper, table 7).

accelerate launch -m recipes.dvae --config recipes/configs/dvae_tiny_imagenet.yaml data.source=FOLDER

It is meant for small images. The paper uses the tokens of OpenAI's dVAE, whose file `recipes.pretrain` takes too.
"""

if __name__ == "__main__":  # before the imports, which take seconds, so that mistakes are reported at once
    from recipes import command_line

    command_line.main("dvae")
    raise SystemExit

from functools import partial
from typing import Any

from torch import Tensor, nn

from arm_zoo.files import WEIGHTS
from arm_zoo.pretraining.dvae import STRIDE
from recipes import command_line
from recipes.command_line import say
from recipes.config import DVAEConfig
from recipes.data.batches import Batch
from recipes.data.loader import EvalLoader
from recipes.data.source import Source
from recipes.objectives import Trained, TrainingObjective
from recipes.signals import StopRequest
from recipes.training.engine import LossFunction
from recipes.training.setup import train

IMAGES_LOOKED_AT = 256


def reconstruction_loss(config: DVAEConfig, source: Source) -> LossFunction:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(source.in_unit_range(batch.images))[0]

    return loss


def export_dvae(trained: Trained) -> None:
    """Write the weights, and print how many of the tokens are in use: few, if the training has collapsed."""
    model, source = trained.model.eval(), trained.source
    model.save_pretrained(trained.folder)
    batch: Any = next(iter(EvalLoader(source.test or source.train, trained.inputs, IMAGES_LOOKED_AT)))
    rows, columns = (side // STRIDE for side in model.input_size()[1:])
    used = model.encoder.tokens(source.in_unit_range(batch.images), (rows, columns)).unique()
    say(f"{len(used)} of {model.encoder.vocab_size} tokens are used by {len(batch.images)} images")


DVAE_TRAINING = TrainingObjective(loss=reconstruction_loss, export=export_dvae)


def run(config: DVAEConfig, resume: str, stop: StopRequest) -> None:
    trained = train(config, DVAE_TRAINING, "dvae", resume, stop)
    folder = trained.folder
    ways = f"dvae={folder / WEIGHTS} model_args.target=dvae_tokens"
    say(f"wrote {folder}; pretrain with {ways} model_args.vocab_size={trained.model.encoder.vocab_size}")


main = partial(command_line.main, "dvae")

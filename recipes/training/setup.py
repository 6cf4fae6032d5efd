"""From a configuration and an objective to a trained model in its folder: all recipes train by this function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from arm_zoo.files import HELD_OUT, write_text
from recipes.config import TrainConfig
from recipes.data.loader import TrainLoader
from recipes.data.sampling import batch_plan
from recipes.objectives import Trained, TrainingObjective
from recipes.signals import StopRequest
from recipes.training.checkpoint import CheckpointFolder
from recipes.training.ema import candidates, moving_average, winner
from recipes.training.engine import Trainer
from recipes.training.export import input_config
from recipes.training.optim import create_optimizer
from recipes.training.parallel import Collectives, model_state, shard, start_accelerator
from recipes.training.plots import plot_run
from recipes.training.progress import Messages, ProgressDisplay, peak_speed
from recipes.training.resume import CURVES, starting_point


def train(
    config: TrainConfig,
    objective: TrainingObjective,
    title: str,
    resume: str,
    stop: StopRequest | None,
    create_loader: Callable[..., Any] = TrainLoader,
) -> Trained:
    """Train, and write `config.yaml`, `metrics.jsonl`, checkpoints, the objective's exports and the curves.

    `title` stands before the progress bar. `resume` is "auto", "none" or the folder of a checkpoint, as in `--resume`.
    `stop` says whether this process was asked to stop. `create_loader` is called with the arguments of `TrainLoader`.
    """
    accelerator = start_accelerator(config)
    plan = batch_plan(config.global_batch, accelerator.num_processes, config.max_batch_per_device)
    output, collectives = Path(config.output_dir), Collectives(accelerator)
    console = Messages(stderr=True, quiet=not accelerator.is_main_process, markup=False, emoji=False)
    checkpoints = CheckpointFolder(output / "checkpoints", config.keep_last, config.keep_every, console)
    start = starting_point(config, resume, collectives, checkpoints, objective.folders)
    source = objective.open(config)
    model: Any = objective.create(config, source)
    inputs = input_config(model, config, source)
    model.set_grad_checkpointing(config.gradient_checkpointing)
    model = model.to(accelerator.device)
    ema = moving_average(model, config)
    models = candidates(model, ema)
    for part in models.values() if config.fsdp else ():
        shard(part, accelerator)
    process, image_size = (accelerator.process_index, accelerator.num_processes), inputs["input_size"][1:]
    loader = create_loader(source, config, plan, image_size, *process, accelerator.device)
    peak = peak_speed(config, inputs["input_size"], accelerator)
    optimizer, loss = create_optimizer(model, config), objective.loss(config, source)
    evaluate = objective.evaluation and objective.evaluation(config, collectives, models, source, inputs)
    display = ProgressDisplay(accelerator, console, title, config, loader.steps_per_epoch, peak)
    trainer = Trainer(
        collectives, model, ema, optimizer, loader, loss, evaluate, config, checkpoints, display,
        stop or StopRequest(), objective.hooks,
    )  # fmt: skip
    trainer.resume(start)
    if source.held_out is not None and accelerator.is_main_process:  # written once nothing can refuse the run any more
        tables: Any = source  # images are held out of tables only
        _, names = tables.test.classes_and_names()
        write_text(output / HELD_OUT, "".join(f"{name}\n" for name in names))
        found = f"{100 * source.held_out:g}% of the images ({len(names)})"
        console.print(f"{found} are held out for validation; {output / HELD_OUT} lists them", soft_wrap=True)
    history = trainer.fit()
    weights = model_state(models[winner(history[-1])])
    classes = {"num_classes": len(source.class_names)} if config.labels_needed else {}
    trained = Trained(config, source, inputs, config.build(**classes), history, output / objective.folders[0])

    def export() -> None:
        trained.model.load_state_dict(weights)
        objective.export(trained)
        plot_run(output / CURVES, history)

    collectives.on_main(export)
    return trained

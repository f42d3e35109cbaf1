"""What a run of so many steps will not get to, said before it starts."""

import math
from collections.abc import Iterator

from enat_jax.training import config as train_config
from enat_jax.training import enat_task, optim, vqgan_task

INITIAL_SHARE = 0.01  # of a moving average: with no more of its start it counts as forgotten


def sentences(loop: train_config.Loop, optimizer: optim.Optimizer, loss: object) -> Iterator[str]:
    """Yields a sentence for every setting that cannot do its work in the steps of the run.

    Each says what to set instead.

    Args:
        loop: with the number of steps.
        optimizer: of the run.
        loss: settings of the task's loss.
    """
    yield from _of_learning_rate(optimizer, loop.num_steps)
    if average := of_average(loss, loop.num_steps):
        decay = math.floor(1000 * INITIAL_SHARE ** (1 / loop.num_steps)) / 1000
        yield f"{average}: give --config.loss.ema_warmup=true or --config.loss.ema_decay={decay:g}"
    if isinstance(loss, vqgan_task.Loss):
        yield from _of_restarts(loss, loop.num_steps)
    yield from _of_intervals(loop)


def of_average(loss: object, step: int) -> str | None:
    """Returns what to say if the moving average after so many steps has not forgotten its start."""
    if not isinstance(loss, enat_task.Loss):
        return None  # there is none
    share = loss.initial_share(step)
    if share <= INITIAL_SHARE:
        return None
    return (
        f"the moving average, which is what is evaluated and exported, still is {share:.0%} the "
        f"initial parameters after {step:,} steps, as config.loss.ema_decay={loss.ema_decay:g} has "
        "it"
    )


def _of_learning_rate(optimizer: optim.Optimizer, num_steps: int) -> Iterator[str]:
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if 2 * warmup > num_steps:
        highest = min(1, num_steps / warmup)
        yield (
            f"the warm-up takes {warmup:,} steps of {num_steps:,}, so the learning rate comes to "
            f"{highest:.0%} of config.optimizer.learning_rate: give "
            f"--config.optimizer.warmup_steps={num_steps // 20}"
        )
    if decay is not None and decay < num_steps and not optimizer.final_share:
        yield (
            f"the learning rate is 0 after step {decay:,} of {num_steps:,}, so the steps after it "
            "change nothing: give --config.optimizer.decay_steps=None"
        )
    if decay is not None and decay > num_steps:
        last = float(optimizer.learning_rate_at(num_steps)) / optimizer.learning_rate
        yield (
            f"the learning rate is still {last:.0%} of its peak after the last step: give "
            "--config.optimizer.decay_steps=None"
        )


def _of_restarts(loss: vqgan_task.Loss, num_steps: int) -> Iterator[str]:
    if not loss.restart_every:
        return
    end = num_steps if loss.restart_until is None else loss.restart_until
    if loss.restart_until is not None and end >= num_steps:
        end = num_steps * 2 // 5
        yield (
            "codes are restarted up to the last step, so they never settle: give "
            f"--config.loss.restart_until={end}"
        )
    last = max(0, end - 1) // loss.restart_every * loss.restart_every
    # A code that nothing is nearest to has this share of an even use left at the last restart.
    if loss.usage_decay**last >= loss.dead_below > 0 and end > 2:
        decay = math.floor(100 * loss.dead_below ** (2 / end)) / 100
        every = max(1, end // 8)
        yield (
            f"no code can be found dead before step {end:,}, where restarts end: give "
            f"--config.loss.restart_every={every} and --config.loss.usage_decay={decay:g}"
        )


def _of_intervals(loop: train_config.Loop) -> Iterator[str]:
    quarter = max(1, loop.num_steps // 4)
    if loop.eval_every > loop.num_steps:
        yield (
            f"config.train.eval_every={loop.eval_every} is more than the {loop.num_steps:,} steps, "
            f"so only the end is evaluated: give --config.train.eval_every={quarter}"
        )
    if loop.save_every > loop.num_steps:
        yield (
            f"config.train.save_every={loop.save_every} is more than the {loop.num_steps:,} steps, "
            "so a run that is killed starts from the beginning: give "
            f"--config.train.save_every={quarter}"
        )

"""What all configs share: settings of the machine and of the run rather than of the experiment.

Any of them can be changed on the command line, as in --config.sharding.fsdp=8.
"""

from ml_collections import config_dict

# Devices along each axis of the mesh; one -1 takes what is left. See enat_jax/sharding.py.
SHARDING = {
    "data": -1,  # share the batch
    "fsdp": 1,  # share the batch and the state
    "tensor": 1,  # share heads and hidden units
    "rules": config_dict.placeholder(tuple),  # what is divided; None: RULES of enat_jax/tasks/
}

# For the section "train"; see enat_jax/train_config.py.
RUN = {
    "accumulate": 1,  # micro-batches of a step, where memory is short
    "keep": 2,  # newest checkpoints that stay
    "keep_every": config_dict.placeholder(int),  # steps between checkpoints that stay for good
    "best_metric": config_dict.placeholder(str),  # such as held_out/loss_0.5_visible
    "best_mode": "min",
    "max_skipped": 10,  # steps in a row that are not finite before the run stops
    "hang_timeout": 1800.0,  # seconds without a step before the run ends
    "matrix_rate": True,  # measure the devices first, to log what share of their rate is used
    "wandb_project": config_dict.placeholder(str),
}

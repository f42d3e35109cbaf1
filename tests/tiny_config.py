"""The config of a transformer that compiles fast, and a measurement of made-up numbers."""

from enat_jax.profiling import timing


def config():
    return {
        "task": "enat",
        "seed": 0,
        "model": {
            "kind": "enat",
            "num_tokens": 16,
            "codebook_size": 8,
            "num_classes": 3,
            "width": 16,
            "num_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
        },
        "mask": {"mask_ratio": "cosine", "min_visible": 0, "reuse_probability": 0.5},
        "training": {"max_shapes": 3},
        "sampler": {"num_steps": 3, "guidance_scale": 1.0},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1},
        "train": {"batch_size": 2, "num_steps": 10},
    }


def measurement(**changes):
    values = dict(
        label={},
        images=4,
        exact=100.0,
        padded=150.0,
        compile_seconds=1.0,
        seconds=(4.0, 1.0, 2.0),
        matmul_rates=(100.0, 300.0, 200.0, 200.0),
        peak_bytes=2**20,
        peak_of="memory",
    )
    return timing.Measurement(**values | changes)

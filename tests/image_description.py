"""A description of a set of images, as statistics hold it."""

DESCRIPTION = {
    "features": {
        "kind": "inception",
        "label": "FID",
        "network": "Inception-v3 of 2015-12-05",
        "resize": "adm",
        "input_size": 299,
        "fingerprint": "ab" * 32,
    },
    "source": {"source": "files", "split": "train", "listing": "cd" * 32},
    "resolution": [256, 256],
    "crop": "center",
    "num_images": 50_000,
    "class_counts": [25_000, 25_000],
    "versions": {"numpy": "2.0"},
}

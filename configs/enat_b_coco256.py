"""ENAT-B on MS-COCO 256x256, text to image: the paper's third experiment.

With MS-COCO of 2014 in coco/, its captions in coco/annotations/ and CLIP ViT-L/14's weights:

    python -m enat_jax.import_torch --vqgan tokenizer_imagenet256_checkpoint --image-size 256 \\
        --out models/vqgan_imagenet256
    python -m enat_jax.import_torch --clip model.safetensors --out models/clip_l14
    python -m enat_jax.tokenize_images --model models/vqgan_imagenet256 --source coco/train2014 \\
        --set classes=none --flips --out runs/coco/tokens
    python -m enat_jax.tokenize_images --model models/vqgan_imagenet256 --source coco/val2014 \\
        --set classes=none --no-flips --out runs/coco/tokens_held_out
    python -m enat_jax.tokenize_captions --tokens runs/coco/tokens \\
        --captions coco/annotations/captions_train2014.json \\
        --held-out-tokens runs/coco/tokens_held_out --out runs/coco/tokens/captions
    python -m enat_jax.tokenize_captions --tokens runs/coco/tokens_held_out \\
        --captions coco/annotations/captions_val2014.json --out runs/coco/tokens_held_out/captions
    python -m enat_jax.train --config configs/enat_b_coco256.py --workdir runs/coco/enat
    python -m enat_jax.sample --model runs/coco/enat/model --text-encoder models/clip_l14 \\
        --prompt "a cat on a red bench" "two dogs in the snow" --num 4 --out runs/coco/pictures
    python -m enat_jax.evaluate --model runs/coco/enat/model --text-encoder models/clip_l14 \\
        --prompts runs/coco/tokens_held_out/captions --reference coco/val2014 \\
        --set classes=none --size 256 --inception FILE --out runs/coco/evaluation

The paper reports FID 6.82 at 8 steps and 116M parameters. It was not reproduced here, and it cannot
be settled without its authors: they released neither code nor weights for MS-COCO, and the paper
names neither the text encoder nor how text meets the cache, neither batch size nor learning rate,
and no setting of the sampler. A step has 2,048 x 50 G multiply-adds; 150,000 of them are some 20
hours of one H100 at 45% of its peak, padding and the text encoder aside: an estimate that nobody
has measured. A micro-batch must fit the memory: ``train.accumulate`` and ``model.remat``. Memory of
the text encoder: 246 MB in bfloat16.

Sources: "paper" is arXiv 2411.06959; "reference" the authors' PyTorch release, which is of ImageNet
alone; "U-ViT" the release of baofff/U-ViT, whose configuration for MS-COCO the paper follows "with
minor adjustments to batch sizes and learning rates"; a "guess" has none of them.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.task = "enat"
    config.seed = 0
    config.model = {
        "kind": "enat",
        "num_tokens": 256,  # a 16x16 grid, paper
        "codebook_size": 1024,  # MaskGIT's tokenizer, paper
        "num_classes": 0,  # texts take the place of classes, and no adaLN: paper
        "width": 768,  # paper Table 7, as the next three
        "num_heads": 8,
        "encoder_layers": 15,
        "decoder_layers": 1,
        "mlp_ratio": 4,  # reference
        "dropout": 0.1,  # of the embedding; reference
        "position_init": "normal",  # N(0, 0.02); reference
        # Last states of CLIP ViT-L/14, all 77 of them with padding: U-ViT; the paper names none.
        "text_width": 768,
        "text_tokens": 77,
        "attend_padding": True,
        "text_positions": False,  # guess: states of CLIP have theirs; U-ViT adds its own
        # What the cost that the paper prints implies, 0.3 T; "once" makes 0.2 T of it, and trains
        # as well on scenes of digits: --config.model.text_encoding=once.
        "text_encoding": "every_step",
        # Guess, almost certain: the paper's 116M parameters have no room for two layers of them.
        "shared_key_value": True,
        # The projection f of the reference, of the paper's ablation: 120.3M parameters in all.
        # "linear" makes 116.2M, the paper's 116M: --config.model.reuse_projection=linear.
        "reuse_projection": "mlp",
        # What the backward pass computes again to save memory: "none", "dots" or "full".
        "remat": "none",
        "attention": "auto",  # or "xla"; "cudnn", on NVIDIA GPUs
        "unroll": 1,
        "dtype": "bfloat16",  # reference: float16 with loss scaling
    }
    config.data = {
        "tokens": "runs/coco/tokens",  # train2014, centre crops and flips; paper
        "captions": "runs/coco/tokens/captions",  # one of about 5 at random; U-ViT
        "held_out_tokens": "runs/coco/tokens_held_out",  # val2014
        "held_out_captions": "runs/coco/tokens_held_out/captions",
        "tokenizer": "models/vqgan_imagenet256",
        "text_encoder": "models/clip_l14",  # U-ViT; the paper names none
    }
    config.mask = {
        "mask_ratio": "beta",  # r ~ Beta(12, 3); reference
        "alpha": 12.0,
        "beta": 3.0,
        "min_visible": 1,  # reference
        "reuse_probability": 0.5,  # paper Section 4.2
    }
    config.loss = {
        "label_smoothing": 0.1,  # reference
        "text_drop": 0.1,  # U-ViT; 0.15 in the same authors' model of CC3M
        "ema_decay": 0.9999,  # reference, U-ViT
        "max_shapes": 40,  # of this implementation: 8.5% of padded work
    }
    config.optimizer = {
        # Guess: batch and rate of ENAT on ImageNet-256, 307M examples in all, where U-ViT saw 256M.
        # Its own pair, 256 and 2e-4, would be 38M examples in the paper's 150,000 steps.
        "learning_rate": 4e-4,
        "warmup_steps": 5000,  # U-ViT, reference
        "schedule": "constant",  # U-ViT, reference
        "b1": 0.9,  # U-ViT for MS-COCO; on ImageNet 0.99, as the reference
        "b2": 0.9,  # likewise
        "eps": 1e-8,  # U-ViT, reference
        "weight_decay": 0.03,  # on all parameters; U-ViT, reference
        "clip_norm": None,  # U-ViT, reference
    }
    # Guess: those of ENAT on ImageNet-256, to start from. Search guidance upwards, on captions that
    # the evaluation does not use: the same authors' model of CC3M has 10.
    config.sampler = {
        "num_steps": 8,  # paper
        "guidance_scale": 2.5,
        "token_temperature": 6.0,
        "mask_temperature": 1.5,
        "num_segments": None,  # of this implementation: by the number of images
    }
    config.train = {
        "batch_size": 2048,  # guess, see the learning rate
        "num_steps": 150_000,  # paper
        "log_every": 100,
        "eval_every": 10_000,
        "save_every": 5_000,
        # 3,700 epochs of 82,783 pictures: the checkpoint of the least loss is kept, too.
        "best_metric": "held_out/loss_0.25_visible",
        "pictures": True,
    }
    return config

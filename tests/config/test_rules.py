"""Which command lines are refused, and which are just allowed."""

import pytest

from rotssl import config as cfg
from rotssl.config.cli import parse
from tests.config.command_lines import refused

BAD_FLAGS = """
--train.epochs 0 | train.epochs: got '0', expected an integer at least 1
--optim.lr 0 | optim.lr: got '0', expected a number greater than 0
--views.flip 1.5 | views.flip: got '1.5', expected a number
--rotation.fraction 0 | rotation.fraction: got '0'
--train.epoch 3 | train.epoch: no such field (did you mean 'train.epochs'?)
--dry | dry: no such field
train.epochs=3 | 'train.epochs=3'
--train.epochs | train.epochs | expected one argument
--train.deterministic | train.deterministic | expected one argument
--train.deterministic yes | train.deterministic: got 'yes', expected true or false
--train.on_nan ignore | train.on_nan: got 'ignore' | 'fail', 'skip'
--encoder.name resnet5 | encoder.name: got 'resnet5' | did you mean 'resnet50'?
--method.name simclrr | method.name: got 'simclrr' | byol | did you mean 'simclr'?
--method.temperature 0.1 | method.temperature: no such field | of simclr, mocov2, swav, dino, not of byol
--method.name simclr --method.momentum 0.9 | method.momentum: no such field | of mocov2, byol | not of simclr
--views.jitter 0.1,0.2 | views.jitter: got '0.1,0.2' | 4 comma-separated numbers
--views.global_scale 0.1 | views.global_scale: got '0.1', expected 2
--config a.yaml --config=b.yaml | --config | 2 files, expected one
--train.batch_size 10 --scaling.num_workers 3 | train.batch_size: got 10 | multiple of the 3 workers
--train.batch_size 3 --scaling.num_workers 3 | train.batch_size: got 3 | at least 2 images
--train.epochs 2 --train.stop_after 3 | train.stop_after: got 3 | at most train.epochs (2)
--train.epochs 2 --optim.warmup_epochs 3 | optim.warmup_epochs: got 3 | at most train.epochs (2)
--views.global_scale 1,0.2 | views.global_scale | smaller share first
--views.blur 1,0,1 | views.blur: got 3 values | each of 2 views
--views.jitter 0,0,0,0.6 | views.jitter | 0.6 | at most 0.5
--data.name imagefolder | data.root: got None | a folder of images
--data.name cifar10 | data.root: got None | cifar10
--data.name cifar100 --data.download true | data.root: got None | cifar100
--data.name tiny-imagenet | data.root: got None | the folder that holds tiny-imagenet
--data.name tiny-imagenet --data.root x --data.download true | data.download: got true | tiny-imagenet cannot be downloaded
--data.download true | data.download: got true | cannot be downloaded
--data.name packed --data.root s3://key:secret@bucket/set | data.root: got s3://bucket/set | no login
--tracking.uri http://alice:secret@host:5000 | tracking.uri: got http://host:5000 | MLFLOW_TRACKING_PASSWORD
--optim.lr_scale linear | optim.lr_scale: got linear | none with lr auto
--rotation.mode in_place --rotation.views 1 | rotation.views: got 1
--rotation.fraction 0.1 --train.batch_size 16 --scaling.num_workers 1 | rotation.fraction: got 0.1 | at least 0.125
--method.name simclr --train.accumulate 2 | train.accumulate: got 2, expected 1 | of simclr is not a mean | byol, simsiam
--method.name mocov2 --train.accumulate 2 | train.accumulate: got 2 | mocov2
--method.name swav --train.accumulate 2 | train.accumulate: got 2 | swav
--method.name barlow --train.accumulate 2 | train.accumulate: got 2 | barlow
--method.name vicreg --train.accumulate 2 | train.accumulate: got 2 | vicreg
--train.accumulate 3 --train.batch_size 16 --scaling.num_workers 2 | train.batch_size: got 16 | 2 workers x 3 passes
--train.accumulate 4 --train.batch_size 8 --scaling.num_workers 2 | train.batch_size: got 8 | at least 2 images
--rotation.fraction 0.25 --train.batch_size 8 --train.accumulate 2 --scaling.num_workers 1 | rotation.fraction | at least 0.5
--method.name mocov2 --views.local_count 2 | views.local_count: got 2, expected 0 | simclr, byol, simsiam, swav | mocov2 takes no
--method.name barlow --views.local_count 2 | views.local_count: got 2 | barlow
--method.name vicreg --views.local_count 2 | views.local_count: got 2 | vicreg
--method.name mocov2 --views.global_count 3 | views.global_count: got 3, expected 2: mocov2
--method.name swav --views.global_count 3 | views.global_count: got 3, expected 2: swav
--views.global_count 1 | views.global_count: got '1', expected an integer at least 2
--views.global_count 3 --views.blur 1,0 | views.blur: got 2 values | each of 3 views
--views.solarize 0,0,0.2 | views.solarize: got 3 values | each of 2 views
--views.local_scale 0.4,0.1 | views.local_scale: got (0.4, 0.1) | smaller share first
--views.size_start 7 | views.size_start: got 7, expected whole pixels, at least 8, or a share below 1
--views.size_start 16.5 | views.size_start: got 16.5, expected whole pixels
--views.size_start 16 --views.size_until 0 | views.size_until: got '0', expected a number greater than 0 and at most 1
--views.split 3 | views.split: got '3', expected an integer at least 1 and at most 2
--views.split 2 --views.size_start 15 | views.size_start: got 15, expected an even side: views.split 2
--views.split 2 --rotation.mode disjoint --train.batch_size 64 | rotation.mode: got disjoint, expected in_place, extra
--views.split 2 --rotation.conditioned true | rotation.conditioned: got true, expected false with views.split 2
--views.split 2 --rotation.head_on projector | rotation.head_on: got projector, expected encoder or a stage with
--views.split 2 --rotation.weight 0 --equivariance.weight 1 | equivariance.weight: got 1.0, expected 0 with views
--encoder.name small --rotation.head_on stage2 | rotation.head_on: got stage2, expected another place: small has no stage2
--encoder.name timm/resnet18 --rotation.head_on stem | rotation.head_on: got stem, expected another place | has no stem
--rotation.degrees 0,45 | rotation.degrees: got (0, 45), expected angles of 0, 90, 180 and 270 in mode in_place
--rotation.degrees 0,90,0 | rotation.degrees: got (0, 90, 0), expected two or more angles, each once
--rotation.mode extra --rotation.degrees 0,360 | rotation.degrees: got '0,360', expected
--rotation.temperature 0.2 | rotation.temperature: got 0.2, expected rotation.loss contrastive
--method.name byol --rotation.loss contrastive --train.accumulate 2 | train.accumulate: got 2, expected 1: rotation.loss
--rotation.loss cosine | rotation.loss: got cosine, expected cross_entropy or contrastive; cosine compares the two views
--rotation.loss cosine --rotation.mode extra --rotation.views 1 | rotation.loss: got cosine
--rotation.loss cosine --rotation.mode extra --rotation.label_noise 0.1 | rotation.label_noise: got 0.1, expected 0 with
--rotation.mode augment --rotation.share 0.2 | rotation.weight: got auto, expected a number, and no rotation.share
--rotation.mode augment --tasks.method_weight 0 | tasks.method_weight: got 0.0, expected more than 0 without an auxiliary task
--rotation.crop_scale 0.4,0.1 | rotation.crop_scale: got (0.4, 0.1) | smaller share first
--encoder.name timm/resnet18 --encoder.stem cifar | encoder.stem: got cifar | timm's encoders keep their own stem
--encoder.name timm/resnet18 --encoder.zero_init true | encoder.zero_init: got true, expected false | timm
--encoder.name resnet18 --encoder.patch_size 8 | encoder.patch_size: got 8, expected auto
--encoder.drop_path 0.1 | encoder.drop_path: got 0.1, expected 0.0
--encoder.name tim/resnet18 | encoder.name: got 'tim/resnet18' | timm/NAME | did you mean 'resnet18'?
--jigsaw.grid 2 | jigsaw.permutations: got 100, expected at most 24 | 4 tiles
--jigsaw.grid 2 --jigsaw.permutations 25 | jigsaw.permutations: got 25
--rotation.mode four_way --rotation.views 1 | rotation.views: got 1, expected 2 | four_way
--rotation.mode in_place --rotation.joint true | rotation.joint: got True, expected False in mode in_place
--rotation.mode four_way --rotation.resolution 0.5 | rotation.resolution: got 0.5, expected 1.0 | four_way
--rotation.mode extra --rotation.joint true --rotation.update_bn false | rotation.update_bn: got false | one forward pass
--rotation.update_bn false | rotation.update_bn: got False | it is for rotation.mode extra and four_way
--rotation.mode extra --rotation.angles independent | rotation.angles: got independent, expected shared | in_place
--rotation.fraction_end 0.1 --train.batch_size 16 --scaling.num_workers 1 | rotation.fraction_end: got 0.1 | at least 0.125
--optim.warmup_lr 0.01 | optim.warmup_lr: got 0.01, expected 0 with lr auto
--optim.final_lr 0.01 | optim.final_lr: got 0.01, expected 0 with lr auto
--optim.lr 0.1 --optim.warmup_lr 0.2 | optim.warmup_lr: got 0.2, expected at most optim.lr (0.1)
--optim.lr 0.1 --optim.final_lr 0.2 | optim.final_lr: got 0.2, expected at most optim.lr (0.1)
--data.name cifar100 | data.root: got None | cifar100
--data.name tiny-imagenet --data.root x --data.download true | data.download: got true | tiny-imagenet cannot be downloaded
--method.name simsiam --method.layers 4 | method.layers: got '4' | at most 3
--method.name swav --method.epsilon 0.001 | method.epsilon: got '0.001' | at least 0.003
--method.name dino --method.center_momentum 1 | method.center_momentum: got '1' | less than 1
--optim.clip_norm 0 | optim.clip_norm: got '0' | greater than 0
--evaluation.network teacher --method.name simclr | evaluation.network: got teacher, expected student: simclr has no teacher
--evaluation.bank 300 --evaluation.knn_k 301 | evaluation.bank: got 300, expected at least evaluation.knn_k, 301
--model.norm split --train.batch_size 20 --scaling.num_workers 1 | train.batch_size: got 20 | a multiple of model.norm_splits (8)
--model.norm split --scaling.num_workers 4 --model.norm_splits 6 | model.norm_splits: got 6, expected a multiple of the 4 workers
--model.norm split --scaling.num_workers 1 --train.accumulate 2 | train.accumulate: got 2, expected 1 with model.norm split
--tracking.run_name a/b | tracking.run_name: got 'a/b'
--storage.path ftp://bucket | storage.path: got 'ftp://bucket'
--storage.path s3:/bucket/x | storage.path: got 's3:/bucket/x', expected two slashes
"""


@pytest.mark.parametrize("line", BAD_FLAGS.strip().splitlines())
def test_a_bad_command_line_is_refused_by_name(line):
    flags, *words = line.split(" | ")
    assert "\n" not in refused(flags.split(), *words)


GOOD_FLAGS = """
--train.accumulate 4 --train.batch_size 16 --scaling.num_workers 2
--method.name dino --train.accumulate 2 --views.local_count 8
--method.name simsiam --train.accumulate 2 --views.global_count 3 --views.blur 1,0,0
--method.name barlow --views.global_count 4
--encoder.name timm/vit_small_patch16_224 --encoder.patch_size 8 --encoder.drop_path 0.1
--encoder.name resnet18 --encoder.stem cifar --encoder.zero_init true
--jigsaw.grid 2 --jigsaw.permutations 24
--views.size_start 8 --views.size_until 1.0
--views.split 2 --views.size_start 10 --rotation.angles independent
--views.split 2 --rotation.mode extra --rotation.head_on projector
--views.split 2 --rotation.head_on stage
--views.split 2 --rotation.weight 0.0 --rotation.mode disjoint --rotation.conditioned false
--rotation.mode extra --rotation.views 1
--rotation.weight 0.0 --rotation.views 1 --rotation.update_bn false
--rotation.weight 0.0 --rotation.mode extra --rotation.joint true --rotation.update_bn false --rotation.angles independent
--rotation.mode four_way --rotation.update_bn false
--optim.lr 0.1 --optim.warmup_lr 0.1 --optim.final_lr 0.1
--data.name cifar100 --data.root x --data.download true
--evaluation.network teacher --method.name dino --evaluation.bank 300 --evaluation.knn_k 300
--model.norm split --model.norm_splits 10 --train.batch_size 20 --scaling.num_workers 1
"""


@pytest.mark.parametrize("line", GOOD_FLAGS.strip().splitlines())
def test_what_is_just_allowed_is_taken(line):
    flags, given = line.split(), cfg.flat(parse(line.split()).config)
    for key, value in zip(flags[::2], flags[1::2], strict=True):
        shown = given[key[2:]]
        assert (",".join(f"{v:g}" for v in shown) if isinstance(shown, list) else str(shown).lower()) == value.lower()

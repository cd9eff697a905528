"""The wording of every message, pinned here and nowhere else.

`...` stands for any text, and a line break for a space. The data set `plain` is in order. TINY are
the settings of a run of seconds, PLAIN the same on `plain`; SAME scores `plain` by itself.
"""

import errno
import importlib.util
import json
import os
import re
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import onnx
import pytest
import tifffile
import torch
from conftest import TINY, snapshot
from PIL import Image
from safetensors.torch import save_file

from nucsam.cli import run_command
from nucsam.data.folders import find_records
from nucsam.data.images import read_image, read_label, read_mask
from nucsam.data.samples import read_nuclei
from nucsam.errors import UserError
from nucsam.export.merged import export_run
from nucsam.predict.models import load
from nucsam.run import checkpoint
from nucsam.score.metrics import score_maps

SETTINGS = [f"{table}.{key}={value}" for table in TINY for key, value in TINY[table].items()]
WORDS = {
    "TINY": SETTINGS,
    "PLAIN": ["data.root=plain", *SETTINGS],
    "SAME": ["--truth", "plain/labels", "--pred", "plain/labels", "--workers", "1"],
}

# A command line, what the user did, and the message. Capital words are of WORDS and SCENES.
COMMANDS = """
$ train data.root=nowhere TINY  # a folder that is not there
nowhere: found no data set (no such folder), expected ORGAN/tissue images (nuinsseg), images and
labels (plain), NAME_mask.png (flat) or a public set in it
$ train  # no data where the default looks
data/NuInsSeg: found no data set (no such folder), ...
$ inspect high  # a folder too high
high: found no data set, expected ...; did you mean high/set? ...
$ inspect page.pt  # an archive
page.pt: found no data set (a file; unpack it), ...
$ inspect flat  # images without folders
flat: found no data set, expected ... in it flat: 12 images without a label, not used; first: ...
$ inspect plain --layout tnbc  # another layout
plain: found no data set, expected the folders of layout tnbc
$ inspect plain --layout tiles  # no layout of ours
layout: found 'tiles', expected auto, nuinsseg, pannuke, ..., plain, flat
$ inspect plain --group (  # half a regular expression
group: found '(', expected a regular expression: missing ), unterminated subpattern at position 0
$ train PLAIN data.group=human  # a group that not every name has
plain: found ... problem(s) plain/images/mouse_fat_1.png: ... that group='human' does not match ...
$ train data.root=masks TINY  # labels in a folder of another name
masks: found 12 problem(s) masks/images/human_bladder_1.png: found no label of this stem, expected
one in a folder of labels beside masks/images ...
$ train data.root=near TINY  # labels of types that are not read
near: found 2 problem(s) near/images/a.png: found no label of this stem, expected one in
near/labels; near/labels/a.npz: convert to TIFF near/images/b.png: ... near/labels/b_mask.jpg: save
labels as PNG or TIFF, or swap the folders if these are the images
$ train data.root=single TINY  # a mask for each nucleus
single: ... found 2 file(s) that begin alike, such as a_mask0.tif: expected one map of all nuclei,
with an id each
$ train data.root=exchanged TINY  # labels for images
12 images: ... exchanged/labels/human_bladder_1.png: found a picture, and a label map in
exchanged/images/human_bladder_1.tif; swap the folders of images and labels ...
$ inspect cellpose  # nothing but Cellpose's own file
cellpose: found no data set, ... cellpose: 1 files that are not taken as labels: save the masks as
PNG or TIFF in Cellpose, because its own file may hold code; first: cellpose/a_seg.npy
$ download pannuke new  # a set that no program may fetch
pannuke: no address serves it without a click; get it yourself, from https://warwick.ac.uk/..., and
unpack it into new
$ download nuinsseg new  # no network
nuinsseg: https://zenodo.org/api/records/10518968 does not list its files (URLError: ...); get them
yourself, from https://zenodo.org/records/10518968, and unpack it into new
$ download cells new  # no such set
name: found 'cells', expected one of nuinsseg, tnbc, monuseg, ...
$ train data.root=twice TINY  # two labels for an image
twice: found 3 problem(s) twice/images/mouse_fat_1.tif: found the stem of mouse_fat_1.png again
...mouse_fat_1.geojson: found twice/labels/mouse_fat_1.tif too, expected one of them ...
$ train data.root=links TINY  # an image twice
links: found 1 problem(s) links/images/mouse_liver_1.png: found the file of links/images/link.png
again, expected each image once
$ train data.root=binary TINY  # masks of 0 and 255
12 images: found 8 problem(s) binary/labels/...: found a binary mask: ... separate components share
the value 255, expected one id per nucleus; data.connected = true makes each component a nucleus ...
$ train data.root=colour TINY  # colour masks
12 images: ... colour/labels/...: found uint8 of shape (96, 96, 3), expected integer ids (H, W)
$ train data.root=cut TINY  # masks of another size
...: found 64x64 px, expected 96x96 as in cut/images/...
$ train data.root=tiny TINY data.folds=2  # images too small
4 images: found 4 problem(s) ...: found 40x40 px, expected at least 64 px a side ...
$ train data.root=empty TINY  # no nuclei
data.root: found no nucleus in the 5 images of empty ... nucleus; nucsam inspect empty counts them
$ train data.root=few TINY data.folds=2  # too few images
data.root: found 2 images in few, of which 1 are left to ... epoch by; expected at least one of each
$ train PLAIN data.folds=20  # more folds than images
data.folds: found 20, expected at most one per group in ...: 12
$ train PLAIN TINY data.images=1  # one image alone
data.images: found 12 images in plain, of which 1 are left ... expected at least one of each
$ folds data.root=few TINY data.folds=2 --out f  # too few images, before the first of them
data.root: found 2 images in few, of which 1 are left to ... epoch by; expected at least one of each
$ train PLAIN model.weights=run  # a run for its weights
model.weights: found the folder run, expected a file; nucsam export makes one of a run directory
$ folds PLAIN data.folds=20 --out f  # more folds than images, before the first of them
data.folds: found 20, expected at most one per group in ...: 12
$ folds PLAIN --out plain  # runs among the images
out: plain is the folder of the images, expected another
$ train run --resume  # a run in place of its images
run: found a run, expected a folder of images; nucsam train --out run --resume continues it
$ train PLAIN data.split=leave-one-out  # one organ to leave out
data.split: found leave-one-out of a single organ, expected several, each in a folder of its own
$ train train.epoch=3  # a typo in a key
command line: unknown key train.epoch; did you mean train.epochs?
$ train trian.epochs=3  # a typo in a table
command line: unknown table [trian]; did you mean train?
$ train scalar.toml  # a value in place of a table
scalar.toml: found train = 3, expected a table [train]
$ train model.head=sma  # a typo in a choice
command line: model.head: found 'sma', expected one of 'instance', 'sam'; did you mean sam?
$ train train.epochs=many  # a word for a number
command line: train.epochs: found 'many' (str), expected a whole number
$ train train.epochs=0  # no epochs
train.epochs: found 0, expected at least 1
$ train train.epochs=3000000000  # too many epochs
train.epochs: found 3000000000, expected at most 2147483647
$ train model.width=100  # a width that does not divide
model.width: found 100, expected a positive multiple of 32, at most 4096
$ train model.pattern=(  # half a pattern
model.pattern: found '(', expected a regular expression: missing ), ...
$ train data.crop=50 data.scale=1  # a crop that fits no stride
data.crop * data.scale: found 50 px, expected a multiple of 32
$ train TINY data.fold=3  # a fold out of range
data.fold: found 3, expected 0 to 2 or 'all'
$ train data.fold=all data.select=test  # all folds, chosen on the test images
data.select: found 'test' with data.fold = 'all', expected 'inner'
$ train model.norms=moving  # statistics that cannot move
model.norms: found 'moving', expected it only with model.train = 'full' and train.checkpoint = false
$ train augment.scale_min=2  # a range upside down
augment.scale_max: found 1.3, expected at least scale_min = 2.0
$ train PLAIN train.log_with=board  # no such tracker
train.log_with: found 'board', expected one of ..., tensorboard, ... or ''
$ train PLAIN train.log_with=aim  # a tracker that is not installed
train.log_with: aim is not installed; expected one that is, or ''
$ train --epochs 3  # settings as options
no such option: --epochs (--help lists them); a setting is table.key=value, such as train.epochs=10
$ train plain flat  # two folders
found 2 folders (plain, flat), expected one
$ train plane  # a folder that is not there
override: found 'plane', expected an existing folder, or table.key=value, such as
data.root=my_folder or train.epochs=10
$ settings speed  # a word of no setting
speed: no setting has it; known: data.root, ...
$ WORLD_SIZE=2 train PLAIN --dry-run  # a rehearsal of several processes
WORLD_SIZE: found 2, expected one process to rehearse
$ train mine.toml  # no such configuration
mine.toml: no such configuration file
$ train yaml.toml  # YAML
yaml.toml: not a readable TOML file: ...
$ train wide.toml  # a TOML file of two bytes a character
wide.toml: not a readable TOML file: found UTF-16, expected UTF-8
$ train a.toml b.toml  # two configurations
found 2 configurations (a.toml, b.toml), expected one
$ train PLAIN model.weights=sam.pth  # weights that are not there
model.weights: no such file: sam.pth...expected a path, 'auto', 'none', 'starter' or hf:USER/NAME
$ train PLAIN model.weights=other.pt  # weights of another model
other.pt does not fit model.encoder = 'mobile_sam': ... tensors differ; ...: found none, expected
fractions (...)... mobile_sam.pt or ... of nucsam export...
$ train PLAIN model.weights=page.pt  # a web page saved as weights
page.pt is not a whole checkpoint of tensors alone (UnpicklingError)... would run code ... Expected
MobileSAM's mobile_sam.pt (download it again) or a file of nucsam export
$ train PLAIN model.weights=all.pt  # a checkpoint of a training
all.pt holds a dict under 'model', expected only tensors...: save the weights alone
$ train PLAIN model.weights=list.pt  # a list of weights
list.pt holds a list, expected a dict of tensors
$ train PLAIN model.weights=sparse.pt  # sparse weights
sparse.pt holds a tensor without dense values under 'weight'...
$ train PLAIN model.weights=nan.pt  # weights that are not numbers
nan.pt: found NaN or infinity in 1 tensors: weight
$ train PLAIN model.weights=run/adapter.safetensors  # an adapter of random weights as base
run/adapter.safetensors: trained on random base weights, which its run holds; expected that run ...
$ train PLAIN model.encoder=lite_medsam model.weights=lora.safetensors  # of another encoder
lora.safetensors: found an adapter of 'mobile_sam', expected one of model.encoder = 'lite_medsam'
$ HUBLESS train PLAIN model.weights=hf:ann/nuclei  # a name on the Hub without a network
hf:ann/nuclei: no route; expected a repository with a model.safetensors of nucsam export
$ train PLAIN model.encoder=efficient_sam_s model.weights=auto  # no address is known
model.weights: found 'auto', but no address serves EfficientSAM-S's efficient_sam_vits.pt, ...
$ train PLAIN model.encoder=efficient_sam_ti model.head=sam  # an encoder without SAM's decoder
...model.head: found 'sam' with model.encoder = 'efficient_sam_ti', ... expected 'instance'
$ train PLAIN model.weights=auto  # no network
mobile_sam.pt: no address serves it. https://...: <urlopen error Name or service not known> ... Put
the file there yourself: cache/mobile_sam.pt; elsewhere, curl -L -o mobile_sam.pt https://...
fetches it. NUCSAM_CACHE names another folder; for a training, model.weights takes its path, or
'none' (random)
$ NUCSAM_CACHE=cached train PLAIN model.weights=auto  # another file in the cache
cached/mobile_sam.pt is not MobileSAM's published ... Delete it to download it again
$ WORLD_SIZE=2 train PLAIN  # processes that are not joined
WORLD_SIZE: the launcher started 2 processes, Accelerate joined 1, so each would run alone; on CPUs
set ACCELERATE_USE_CPU=true or use launch/cpu2.yaml
$ predict run flat --out p --device gpu  # no such device
...device: found 'gpu', expected auto, cpu, cuda, cuda:N or mps
$ predict run flat --out p --device cuda:99  # no such GPU
...device: found 'cuda:99', but PyTorch sees ... GPU(s), so no cuda:99; expected cpu
$ predict run flat --out p --device mps  # no Mac
...device: found 'mps', but PyTorch sees no GPU of Apple; expected cpu
$ WORLD_SIZE=2 predict run flat --out p --device cuda:0  # one GPU for two processes
...device: found 'cuda:0' for 2 processes, expected ...
$ FULL synth full --images 1 --size 64  # a full disk
...: [Errno 28] No space left on device; what was there before is unharmed
$ train PLAIN model.pattern=x  # a pattern that matches nothing
...pattern...'x'...linear layer...
$ train PLAIN model.width=64 model.weights=merged.safetensors  # a head of another width
merged.safetensors: found another head...model.width = 64...
$ NUCSAM_CACHE=page.pt train PLAIN model.weights=auto  # a file for the cache
page.pt/mobile_sam.pt: cannot be written (...); elsewhere, ... NUCSAM_CACHE names another folder;
for a training, model.weights takes its path, or 'none' (random)
$ GPUS LOCAL_RANK=2 folds PLAIN --out OUT/f  # more processes than GPUs
LOCAL_RANK: found 2 with the GPUs 0, 1, expected at ... CUDA_VISIBLE_DEVICES=0,0 puts two on one
$ UNLOCKED folds PLAIN --out OUT/f  # a file system without locks
...: cannot be locked ([Errno 37] No locks available); expected a file system with locks
$ MEMORY predict run flat --out OUT/p  # a batch that the GPU cannot hold
out of device memory: lower ...batch, then ...tile (no memory)
$ MEMORY train PLAIN --out OUT/run  # a training that the GPU cannot hold
out of device memory with train.batch=2 crops ... train.batch=1 train.accumulate=2, ...
train.checkpoint=true; data.crop=32. (no memory)
$ train PLAIN train.lr_head=1e30 train.ema=0 --out OUT/run  # a learning rate far too high
the loss {...} is not finite at or before step ... Lower ... continues from the last saved state
$ BARE export run --out m.onnx  # the packages are not installed
found no onnx, onnxscript, onnxruntime: pip install 'nucsam[onnx]' installs it
$ BARE report run  # the packages are not installed
found no matplotlib: pip install 'nucsam[report]' installs it
$ predict foreign.safetensors flat --out p  # tensors of another program
foreign.safetensors: found no `nucsam` metadata, expected a file that nucsam wrote
$ export run/state/last.safetensors --out m.pt  # a state for an adapter
run/state/last.safetensors: found a file of kind 'state', expected an adapter file or a run
directory; export that run again
$ export unnamed.safetensors --out m.pt  # an adapter without a base
unnamed.safetensors: metadata: found no base, expected one
$ export lora.safetensors --out m.pt --base none  # an adapter of another base
lora.safetensors: trained on the base ... (none (random, seed 0)), found the base ... (none ...)
$ evaluate wide  # the head of another width
wide/adapter.safetensors: weights do not fit the model: ... tensors differ; head...: found
fractions (...), expected fractions (...), ...
$ evaluate baseless  # another program's tensors for the base
baseless/base.safetensors: found a file of kind None, expected 'base'
$ train PLAIN --out torn --resume  # a state cut off
torn/state/last.safetensors: not a readable ...; delete it to start the run again
$ train PLAIN --out swapped --resume  # an adapter for a state
swapped/state/last.safetensors: found a file of kind 'adapter', expected 'state'; delete it to ...
$ train PLAIN --out unlike --resume  # a state of another model
unlike/state/last.safetensors: does not fit this ... weights...; delete it to start the run again
$ train PLAIN --out stuck --resume  # a state without its progress
stuck/state/last.safetensors: found no progress of a run; delete it to start the run again
$ train PLAIN --out run  # a run directory that exists
run: found files, expected a new or empty folder; give ... resume to continue the run there
$ train PLAIN train.seed=1 --out run --resume  # resuming with another setting
run/config.toml: cannot resume with another configuration: train.seed: 0 -> 1 ... settings, or
another out for a new run
$ train PLAIN data.root=fewer --out run --resume  # resuming with other images
fewer: found other images than run was split on, so that ... removed: mouse_liver_1...
$ evaluate plain  # a folder without a run
plain: found no config.toml, expected a run directory of nucsam train
$ evaluate old  # a run of another version
old/config.toml: unknown key loss.hover; known: ...
$ evaluate begun  # a run that has just begun
begun/adapter.safetensors: no such file: the run has not ... resume it with nucsam train --resume
$ evaluate edited  # a run whose settings were edited
edited/adapter.safetensors: trained with other ... edited/config.toml says: model.alpha: 8.0 -> 4.0
$ evaluate moved  # data that has moved
nowhere: found no data set ...; if the images have moved, name their folder
$ train --out moved --resume  # data that has moved, to train on
nowhere: found no data set ...; if the images have moved, data.root=FOLDER says where they are
$ train --out moved --resume train.presentations=9  # the same, where their number sets the epochs
nowhere: found no data set ...; if the images have moved, data.root=FOLDER says where they are
$ evaluate run --data fewer  # other data
fewer: found other images than run was split on, so that ... removed: mouse_liver_1...
$ folds data.fold=1 --out f  # a fold for all folds
data.fold: found it on the command line; folds trains every fold without it
$ folds PLAIN --out a=b  # an override as folder
out: found a=b, expected a path without =, which would read as table.key=value
$ folds PLAIN --out run  # folds in a run
out: run is one run, expected a folder for the runs of all folds
$ folds PLAIN --out others  # folds of another configuration
out: holds runs of another configuration (found -> ... others/folds.toml: train.seed: 3 -> 0
$ folds PLAIN --out f --grid model.rank=4  # a grid of one value
grid: found 'model.rank=4', expected 'table.key=[a, b, c]' in TOML's notation, strings quoted
$ folds PLAIN --out f --grid data.fold=[0,1]  # a grid of folds
grid: found data.fold, expected each key once, and not data.fold
$ folds PLAIN --out f --grid model.alpha=[8,8.0]  # a value twice in a grid
grid: found model.alpha=8.0 twice
$ report plain  # a report of no run
plain: found no config.toml in it or in its sub-folders, ... train or the folder of nucsam folds
$ report half  # a report of half a file
half/scores.json: not JSON (Expecting ...)
$ report listed  # a report of another document
listed/scores.json: found a list, expected a dict
$ evaluate --pred plain/labels  # nothing to score
evaluate: expected either RUN, or both --truth and --pred
$ evaluate run --vague flat --connected --workers 0  # options for label maps
evaluate: found --vague, --connected, --workers beside RUN, which does not take that (see --help)
$ evaluate SAME --untrained --data plain --overlays OUT/o  # options for a run
evaluate: found --untrained, --data, --overlays beside --truth and --pred, which does not take that
(see --help)
$ evaluate --truth plain/labels --pred page.pt  # no folder of predictions
page.pt: expected a folder of label maps
$ evaluate --truth plain/labels --pred old  # a folder without label maps
old: found no .tif, .tiff, .png, .npy file in it or in its sub-folders
$ evaluate --truth plain/labels --pred other  # predictions of other names
no file of other has the stem of one in plain/labels: found x, expected human_bladder_1, ...
$ evaluate --truth plain/labels --pred double  # two files for an image
double: found 1 problem(s) double/x.tif: found the stem of x.png again
$ evaluate --truth plain/labels --pred cut/labels --workers 1  # predictions of another size
12 images: found 12 problem(s) ...: found different shapes: truth (96, 96), prediction (64, 64) ...
$ evaluate --truth flat --pred flat --protocol nuinseg  # a typo in the protocol
protocol: found 'nuinseg', expected one of nuinsseg, nuinsseg-no-vague, nuceval, plain
$ evaluate SAME --iou 50  # a percentage for a threshold of overlap
iou: found 50, expected 0 to 1
$ evaluate SAME --zone -1  # a ring of no width
zone_width: found -1, expected at least 0
$ evaluate SAME --organ (  # half a pattern of organs
organ: found '(', expected a regular expression: missing ), ...
$ evaluate SAME --workers -1  # fewer than no processes
workers: found -1, expected 0 or more
$ evaluate SAME --json flat  # scores into a folder
flat: found a folder or device, expected a file
$ predict model flat --out p  # no such model
model: found no such file, expected a run directory, or a safetensors or ONNX file of nucsam export,
'starter' or hf:USER/NAME
$ predict flat starter --out p  # images before the model
starter: no such file or folder; MODEL comes before PATHS
$ predict run results --out p  # results in place of images
results: found results of nucsam predict, expected images
$ predict none.onnx flat --out p  # no such graph
none.onnx: no such file, expected one of nucsam export
$ predict page.onnx flat --out p  # a page in place of a graph
page.onnx: not a readable ONNX graph (...)
$ predict other.onnx flat --out p  # a graph of another program
other.onnx: found another graph, expected one of nucsam export
$ predict other.onnx flat --out p --device mps  # a device that onnxruntime lacks
...device: found 'mps', expected auto or cpu (no CUDA in onnxruntime)
$ BARE predict other.onnx flat --out p  # the package is not installed
found no onnxruntime: pip install 'nucsam[onnx]' installs it
$ BARE predict run flat --out p --formats parquet  # a format of an extra
found no pyarrow, shapely: pip install 'nucsam[spatial]' installs it
$ TORCHLESS predict run flat --out p  # PyTorch is not installed
run: needs PyTorch, found none; expected an .onnx file of nucsam export
$ predict other.pt flat --out p  # a file that is no model
other.pt: found a .pt file, expected ... a run directory...
$ predict run/base.safetensors flat --out p  # a base as model
run/base.safetensors: found a file of kind 'base', expected 'merged'
$ predict run/adapter.safetensors flat --out p  # an adapter of random weights as model
run/adapter.safetensors: trained on random ... holds; expected that run directory, or the base
$ predict run none.png --out p  # no such image
none.png: no such file or folder
$ predict run old --out p  # a folder without images
old: found no image, expected .png, ...
$ predict run nested --out p  # a folder of folders
nested: found no image, expected ...; its subfolders have some, so name them instead: p1
$ predict run drawings --out p  # a folder of other files
drawings: found no image, expected ...; convert to TIFF what lies there: 1 .svg
$ predict run drawing.svg --out p  # a drawing
drawing.svg: found .svg suffix, expected .png, ...; convert it to TIFF
$ predict run flat --out page.pt  # a file for a folder of results
...out: page.pt is a file, expected a folder
$ predict run plain/labels --out plain/labels  # results over the images
plain/labels/human_bladder_1.tif: ...over...; expected another ...out...
$ predict run flat plain/images --out p  # images of one stem
plain/images/human_bladder_1.png: ...the stem of flat/human_bladder_1.png...expected ...
$ predict run flat --out p --formats label  # a typo in the formats
...formats: found ['label'], expected labels, geojson, geojson.gz, csv, parquet, overlay, tissue
$ predict run flat --out p --formats tissue  # a mask alone
...formats: found tissue alone, expected another format beside it
$ predict run flat --out p --per-device 0  # no process a GPU
...per_device: found 0, expected at least 1
$ predict run flat --out p --adapt 6  # a percentage for a share
model.adapt: found 6.0, expected a number from 0 to 1
$ predict run flat --out p --scale 2 --mpp 0.5  # two magnifications
...scale, ...mpp: found both, expected one
$ predict run flat --out p --scale 2 --auto-scale  # a magnification, and another by itself
...scale, ...auto...scale: found both, expected one
$ predict run flat --out p --mpp 0  # no magnification
...mpp: found 0, expected 0.05 to 4 microns per px
$ predict run flat --out p --tile 3  # a tile too small
...tile: found 3, expected at least 64 px
$ predict run flat --out p --roi empty.geojson  # one file of regions for many images
...roi: found empty.geojson for 12 images, expected one image, or a folder with a ...
$ predict run flat --out results --formats labels  # results of other settings
results/predict.json: ...other...: tta: True -> False; expected another ...out, or ...force
$ predict run flat/human_bladder_1.png --out results --formats labels --force  # too few images
results: found 1 result(s) that ...force would ..., such as results/human_bladder_2.tif; ...
$ export none --out m.pt  # no such run
none: no such file or folder, expected a run directory, an adapter file or starter
$ export run --push nuclei  # a repository without its owner
push: found 'nuclei', expected USER/NAME
$ export run --push ann/nuclei --format onnx  # what no other nucsam would read by that name
format: found 'onnx' to upload, expected safetensors or adapter
$ export run --out m.pt --format pickle  # no such format
...format: found 'pickle', expected one of safetensors, sam, onnx, adapter
$ export run --out m.onnx --format adapter  # the suffix of another format
...out: found m.onnx for the format adapter, expected .safetensors
$ export run --out m.pt --base auto  # a base too many
...base: ...run...names its base...expected an adapter file
$ export run  # no file
export: expected --out FILE, --push USER/NAME, or both
$ export run --out m.pt --half  # half precision for stock code
...half: found it for the format sam, expected safetensors or adapter
$ HUBLESS export run --push ann/nuclei  # no network to push by
hf:ann/nuclei: no route; expected a repository of yours; `hf auth login` keeps your token
$ export run --out m.onx  # a typo in the suffix
out: found m.onx, expected a name that ends in .onnx, .pt, .safetensors
$ export run --out m.pt --adapt 0.06  # norms of a head that is not there
adapt: found it for the format sam, which has no head that adapts
$ export run --out flat  # export into a folder
out: found flat, expected a name that ends in .onnx, .pt, .safetensors
$ export run --out other.pt  # export over a file
other.pt: exists; ...force replaces it
$ export run --out page.pt/m.pt  # export under a file
page.pt/m.pt: ...exists...; what was there before is unharmed
$ export unfinished --out m.pt  # an unfinished run
unfinished: found an unfinished run, 1 of 2 epochs; nucsam ... --out unfinished --resume finishes it
$ export headless --out m.pt  # scores of something else
headless/scores.json: found no images_of, expected one
$ synth plain  # synthetic images over others
plain: found files there, expected a new or empty folder
$ synth page.pt/set  # synthetic images under a file
page.pt: expected a folder (...exists...)
"""

# A call on a file or an argument, what is wrong with it, and the message.
CALLS = """
> read_image none.png  # no such image
none.png: cannot be read (FileNotFoundError: ...), expected a whole .png file
> read_image plain  # a folder of images
plain: found no suffix, expected .png, .jpg, .jpeg, .bmp, .tif, .tiff, .svs, .ndpi, ..., .dcm
> read_image folder.png  # a folder of an image's name
folder.png: found a folder or device, expected a file
> read_image float.tif  # real numbers
float.tif: found values of float64, expected 8 or 16 bits
> read_image animated.png  # two frames
animated.png: found 2 frames, expected one image
> read_image two.tif  # two images
two.tif: found 2 images (9x9, 9x5 px), expected one
> read_image stack.tif  # a stack
stack.tif: found a stack with axes ... of shape (5, 9, 9), expected one image
> read_image tableless.tif  # the end cut off
tableless.tif: found 1 page(s) and no end of the page table, expected a whole TIFF
> read_image short.tif  # pixels cut off
short.tif: found ... of ... bytes, expected a whole TIFF
> read_image pageless.tif  # all cut off
pageless.tif: found no page, expected a whole TIFF
> read_image text.tif  # a page of the web
text.tif: cannot be read (TiffFileError: not a TIFF file ...), expected a whole .tif file
> read_image newer.tif  # a compression that no decoder knows
newer.tif: cannot be decoded (...39321...), expected a common compression; save it as TIFF with
deflate
> read_image lab.tif  # colours of a press
lab.tif: found 3 channels of CIELAB, expected grey, RGB, CMYK or YCbCr
> SMALL read_label palette.tif  # more pixels than memory holds
palette.tif: found 9x9 px, expected at most 3 px; cut it into pieces
> BARE read_image slide.ndpi  # a slide without OpenSlide
slide.ndpi: a .ndpi slide needs OpenSlide: pip install 'nucsam[slides]' adds it (none)
> read_image slide.ndpi  # no slide
slide.ndpi: cannot be read (OpenSlideUnsupportedFormatError: ...), expected a whole .ndpi file; if
the scanner's own program opens it, convert it to TIFF
> read_mask float.tif  # a mask of real numbers
float.tif: found float64 of shape (9, 9), expected integers (H, W) or (H, W, 1 to 4)
> read_label negative.npy  # negative ids
negative.npy: found ids in -1..-1, expected 0..2147483647
> read_outlines none.geojson  # no such outlines
none.geojson: cannot be read (FileNotFoundError: ...), expected GeoJSON
> read_outlines 3  # JSON, but no GeoJSON
3.geojson: expected a FeatureCollection, a list of Features or a Feature
> read_outlines circle  # a shape that GeoJSON lacks
circle.geojson: feature 1: found the geometry {'type': 'Circle'}, expected a Polygon or MultiPolygon
> read_outlines geometry  # a geometry without its Feature
geometry.geojson: feature 1: expected a Feature with a geometry
> read_outlines numbers  # a ring of numbers
numbers.geojson: feature 1: found a ring that is no list of points [x, y] (...)
> read_outlines rings  # a number for rings
rings.geojson: feature 1: found the geometry {'type': 'MultiPolygon', ... expected a Polygon or ...
> read_outlines far  # a coordinate of another planet
far.geojson: feature 1: found a coordinate that is not finite or over 1e+09 px
> read_outlines outside  # coordinates of another image
outside.geojson: found no pixel of 9x9 px in any of 1 nuclei, expected coordinates in px
> read_outlines beyond  # a region of another image
beyond.geojson: found no pixel of 9x9 px in any of 1 regions, expected coordinates in px
> read_rois page.xml  # XML of another program
page.xml: found the element html, expected Aperio's XML: Annotations, ...
> read_rois page.roi  # not a ROI
page.roi: cannot be read (...), expected an ImageJ ROI or a zip file of them
> read_rois folder.roi  # a folder
folder.roi: found a folder or device, expected a file
> find_records  # an empty name
root: found an empty path, expected a folder of images and label maps
> find_records null  # a null byte in a name
a\0b: cannot be listed (embedded null byte), expected a folder
> score flat  # one dimension
truth: found shape (9,), expected a 2-D label map (H, W)
> score real  # probabilities
truth: found dtype float64, expected integer ids
> score negative  # negative ids
truth: found ids from -1 to 0, expected 0 to 2**63 - 1
> read_tensors none  # no such file of tensors
none: no such file; expected one that nucsam wrote
> read_tensors plain  # a folder of tensors
plain: not a readable safetensors file (...)
> forward 50  # an image of a side that no stride divides
...50 x 64 px, expected multiples of 32...
> magnify 99  # an image far larger than those trained on
...found 0.0... times the magnification trained on...expected 0.125 to 8 times
> predict floats  # an image of real numbers
image: found float64 of shape (9, 9), expected uint8 (H, W, 3)
"""

# Command lines that succeed, and what they remark on.
REMARKS = """
$ train PLAIN data.crop=128 train.epochs=1 train.precision=fp16 --out OUT/new --resume  # doubtful
data.crop: found 128 px, but no image with a shorter side over 96 px; a smaller crop is faster
resume: OUT/new holds no saved state; a new run starts
images: 5 train, 3 inner, 4 test; base none (random, seed 0)
trains ... of ... parameters on the CPU in fp32
threads: 1, loader processes: 0, idle cores: ...
5 images x 1 epochs = 3 optimizer steps; 1,500 or more are usual
random base weights: the scores say nothing about published weights
epoch 1: loss ..., ... images/s; DICE ..., AJI ..., PQ ...
epoch 1 (chosen by aji on the inner split), test images, one seed, base none (random, seed 0): DICE
warning: train.precision: fp16 needs a GPU; computing in fp32 on this CPU
$ train plain TINY --out OUT/folder  # a folder as argument
plain: 12 images; ...
$ train PLAIN data.crop=96 instances.area=2000 --dry-run  # before a training
images in 12 groups; about ... min, with ... s a step; ... GiB of memory; this dry run
keeps nothing
data.inner: only 3 image(s) choose the epoch, partly by chance
data.folds: only 4 image(s) are scored; nucsam folds scores every image once
instances.area: 100% of the nuclei are under 2000 px and will be dropped
train.epochs=500 makes the usual 1,500 steps
$ evaluate run --untrained  # before the first step, and after the last
image mean, % (nuinsseg) ... before training ... after, epoch ...
$ evaluate --truth plain/labels --pred binary/labels --workers 1  # masks for label maps
human_bladder_1: prediction: found a binary mask: ... separate components share the value 255, each
$ evaluate --truth few/labels --pred mixed --workers 1  # predictions of other images
1 true label maps without a prediction are not scored, beside 1 images that are: human_bladder_2
1 predictions without a true label map are not scored, beside 1 images that are: x
$ inspect unused --sheet OUT/sheet.png  # labels of other images
unused: 1 labels without an image, not used; first: unused/labels/x.tif
contact sheet: OUT/sheet.png
$ inspect camera --sheet OUT/sheet.png  # photographs that a camera has turned, and a printer's dpi
1 image(s): orientation tag 6 turns the image, and labels must match the turned image; first: camera
1 image(s): 300 dpi is no microscope's resolution, so nucsam ignores it; first: camera/images/
$ inspect summed --sheet OUT/sheet.png  # NuInsSeg's first labels
summed: 12 labels from 'label masks', where overlaps are sums of ids: expect spurious nuclei; first:
$ inspect holed --sheet OUT/sheet.png  # an outline without an area
warning: holed/annotations/x.geojson: found 1 empty geometry, not used; expected outlines of nuclei
contact sheet: OUT/sheet.png
$ predict run few/images --out OUT  # two images
OUT: 2 image(s), ... nuclei, ... tiles in ... s
$ predict unfinished few/images --out OUT --formats labels  # a run that trains on
unfinished: UNFINISHED, 1 of 2 epochs; its best epoch so far predicts
$ predict run few/images --out again --formats labels  # the same again
2 image(s) with results skipped; ...force replaces them
$ export run --out OUT/m.safetensors  # a model
OUT/m.safetensors: ... tensors, ... values, ... MiB
$ synth OUT/new --images 1 --size 64  # an image
OUT/new: 1 images of 64 px
"""


def failing(error: Exception) -> Callable:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def without_torch(name: str, *_: object) -> object:
    return None if name == "torch" else FIND_SPEC(name)


def without_extras(name: str, *_: object) -> object:
    extras = ("onnx", "onnxscript", "onnxruntime", "matplotlib", "pyarrow", "shapely")
    return None if name in extras else FIND_SPEC(name)


FIND_SPEC = importlib.util.find_spec
NO_MEMORY = failing(torch.OutOfMemoryError("no memory"))
STEPS = ("nucsam.predict.predictor.Predictor.extract", "nucsam.train.loop.step")
SCENES = {  # what stands in for what, where a line begins with the word
    "BARE": {
        "importlib.util.find_spec": without_extras,
        "nucsam.data.slides.import_module": failing(ImportError("none")),
    },
    "FULL": {"tifffile.imwrite": failing(OSError(errno.ENOSPC, "No space left on device"))},
    "GPUS": {"os.environ": os.environ | {"ACCELERATE_USE_CPU": "", "CUDA_VISIBLE_DEVICES": "0, 1"}},
    "HUBLESS": dict.fromkeys(
        ("huggingface_hub.hf_hub_download", "huggingface_hub.HfApi.create_repo"),
        failing(OSError("no route")),
    ),
    "MEMORY": dict.fromkeys(STEPS, NO_MEMORY),
    "SMALL": {"nucsam.data.slides.MOST": 3},
    "TORCHLESS": {"importlib.util.find_spec": without_torch},
    "UNLOCKED": {"fcntl.flock": failing(OSError(errno.ENOLCK, "No locks available"))},
}
ZEROS = np.zeros((9, 9), int)
GREY = np.zeros((64, 64, 1), np.uint8)
MAPS = {"flat": ZEROS[0], "real": ZEROS / 2, "negative": ZEROS - 1}
FUNCTIONS = {
    "read_image": read_image,
    "read_label": read_label,
    "read_mask": read_mask,
    "read_outlines": lambda name: read_nuclei(Path(name).with_suffix(".geojson"), (9, 9)),
    "read_rois": lambda name: read_nuclei(Path(name), (9, 9)),
    "read_tensors": lambda name: checkpoint.read_tensors(Path(name)),
    "find_records": lambda name="": find_records(name and "a\0b"),
    "score": lambda name: score_maps(MAPS[name], ZEROS),
    "forward": lambda _: load("run").model(torch.zeros(1, 3, 50, 64), (50, 64)),
    "magnify": lambda scale: load("run", scale=float(scale)).predict(np.repeat(GREY, 3, 2)),
    "predict": lambda _: load("run").predict(ZEROS / 2),
}


@pytest.fixture(scope="module")
def place(folder, tmp_path_factory) -> Path:
    """The folder in which the lines run."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make_data_sets(folder)
        make_files()
        make_runs()
    return place


def make_data_sets(folder: Path) -> None:
    """Data sets gone wrong in one way each."""
    names = "plain/images plain/labels flat other double mixed cached"
    for name in names.split():
        Path(name).mkdir(parents=True)
    for image in folder.glob("*/tissue images/*.png"):
        label = image.parents[1] / "label masks modify" / f"{image.stem}.tif"
        for file, copy in ((image, "flat"), (image, "plain/images"), (label, "plain/labels")):
            shutil.copy(file, copy)
    most = {"fewer": ["mouse_liver_1.*"], "few": ["mouse_*", "human_[ks]*"]}
    for name in ("twice", "links", "masks", "fewer", "few"):
        shutil.copytree("plain", name, ignore=shutil.ignore_patterns(*most.get(name, [])))
    changes = {
        "binary": lambda label: (label > 0).astype(np.uint8) * 255,
        "colour": lambda label: np.stack([label * 40, label * 90, label * 7], -1).astype(np.uint8),
        "cut": lambda label: label[:64, :64],
        "empty": np.zeros_like,
    }
    for name, change in changes.items():
        shutil.copytree("plain", name)
        for path in Path(name, "labels").iterdir():
            Image.fromarray(change(tifffile.imread(path))).save(path.with_suffix(".png"))
            path.unlink()
    shutil.copytree("few", "high/set")
    shutil.copytree("few", "unused")
    shutil.copytree(folder, "summed")
    shutil.copytree("few", "camera")
    turned, printed = sorted(Path("camera/images").iterdir())[:2]
    exif = Image.Exif()
    exif[274] = 6
    Image.open(turned).save(turned, exif=exif)
    Image.open(printed).save(printed.with_suffix(".tif"), dpi=(300, 300))
    printed.unlink()
    for path in Path("summed").glob("*/label masks modify"):
        path.rename(path.with_name("label masks"))
    assert run_command(["synth", "tiny", "--images", "4", "--size", "64"]) == 0
    for path in Path("tiny").rglob("*.png"):
        Image.open(path).crop((0, 0, 40, 40)).save(path)
    for path in Path("tiny").rglob("*.tif"):
        tifffile.imwrite(path, tifffile.imread(path)[:40, :40])
    Path("masks/labels").rename("masks/truth")
    shutil.copytree("plain", "exchanged")
    Path("exchanged/images").rename("exchanged/labels_")
    Path("exchanged/labels").rename("exchanged/images")
    Path("exchanged/labels_").rename("exchanged/labels")
    picture, label = "plain/images/mouse_fat_1.png", "plain/labels/mouse_fat_1.tif"
    for name, source in {
        "near/images/a.png": picture,
        "near/images/b.png": picture,
        "near/labels/a.npz": picture,
        "near/labels/b_mask.jpg": picture,
        "single/images/a.png": picture,
        "single/masks/a_mask0.tif": label,
        "single/masks/a_mask1.tif": label,
        "cellpose/a.png": picture,
        "cellpose/a_seg.npy": label,
        "nested/p1/a.png": picture,
        "drawings/a.svg": label,
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, name)
    Path("twice/annotations").mkdir()
    for name in ("images/mouse_fat_1.tif", "annotations/mouse_fat_1.geojson"):
        Path("twice", name).touch()
    shutil.copy("plain/images/mouse_fat_1.png", "twice/images/link.png")
    Path("links/images/link.png").symlink_to("mouse_liver_1.png")
    shutil.copy("plain/labels/mouse_liver_1.tif", "links/labels/link.tif")
    names = "other/x.tif double/x.tif double/x.png mixed/x.tif unused/labels/x.tif"
    for name in names.split():
        shutil.copy("plain/labels/mouse_fat_1.tif", name)
    shutil.copy("plain/labels/human_bladder_1.tif", "mixed")


def make_files() -> None:
    """Files that are not what their names say."""
    tensor = torch.ones(3)
    for name, content in {
        "other.pt": {"image_encoder.weight": tensor},
        "all.pt": {"model": {"weight": tensor}, "epoch": 3},
        "list.pt": [tensor],
        "sparse.pt": {"weight": tensor.to_sparse()},
        "nan.pt": {"weight": tensor / 0 * 0},
    }.items():
        torch.save(content, name)
    Path("wide.toml").write_text("[data]\nfolds = 4\n", encoding="utf-16")
    values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "ab"]
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    graph = onnx.helper.make_graph([node], "graph", values[:1], values[1:])
    onnx.save(onnx.helper.make_model(graph, ir_version=10), "other.onnx")
    for name in ("page.pt", "page.onnx", "drawing.svg", "yaml.toml", "cached/mobile_sam.pt"):
        Path(name).write_text("<!DOCTYPE html>: 404")
    Path("scalar.toml").write_text("train = 3")
    save_file({"x": tensor}, "foreign.safetensors")
    checkpoint.write_tensors(Path("unnamed.safetensors"), {"x": tensor}, {"kind": "adapter"})
    corner = [(0, 0), (3, 0), (3, 3), (0, 3)]
    for name, document in {
        "3": 3,
        "circle": [{"type": "Feature", "geometry": {"type": "Circle"}}],
        "geometry": [{"type": "Polygon"}],
        "numbers": [polygon([1, 2])],
        "rings": [{"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [7]}}],
        "empty": [polygon([]), polygon(corner), region(corner)],
        "beyond": [region([(50, 50), (60, 50), (60, 60)])],
        "far": [polygon([(0, 0), (1e10, 1), (1, 0), (0, 0)])],
        "outside": [polygon([(50, 50), (60, 50), (60, 60), (50, 50)])],
    }.items():
        Path(f"{name}.geojson").write_text(json.dumps(document))
    for name in ("holed/images", "holed/annotations"):
        Path(name).mkdir(parents=True)
    shutil.copy("plain/images/mouse_fat_1.png", "holed/images/x.png")
    shutil.copy("empty.geojson", "holed/annotations/x.geojson")
    Path("folder.png").mkdir()
    Path("folder.roi").mkdir()
    for name in ("page.xml", "page.roi"):
        Path(name).write_text("<html/>")
    grey = np.zeros((9, 9), np.uint8)
    frame = Image.fromarray(grey)
    frame.save("animated.png", save_all=True, append_images=[Image.fromarray(grey + 9)])
    frame.convert("P").save("palette.tif")
    tifffile.imwrite("float.tif", grey + 0.5)
    tifffile.imwrite("two.tif", grey)
    tifffile.imwrite("two.tif", grey[:5], append=True)
    tifffile.imwrite("stack.tif", np.stack([grey] * 5), photometric="minisblack")
    channels = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
    tifffile.imwrite("channels.tif", np.zeros((3, 70, 90), np.uint8), ome=True, **channels)
    pages = Path("channels.tif").read_bytes()
    Path("tableless.tif").write_bytes(pages[: len(pages) // 2])
    Path("short.tif").write_bytes(Path("float.tif").read_bytes()[:-9])
    Path("pageless.tif").write_bytes(struct.pack("<4sHH", b"II*\0", 16, 0))
    Path("text.tif").write_text("<!DOCTYPE html>: 404")
    Path("slide.ndpi").write_text("<!DOCTYPE html>: 404")
    Image.new("LAB", (9, 9)).save("lab.tif")
    tifffile.imwrite("newer.tif", grey, compression="zlib")
    known, newer = (struct.pack("<HHIH", 259, 3, 1, code) for code in (8, 39321))
    Path("newer.tif").write_bytes(Path("newer.tif").read_bytes().replace(known, newer))
    np.save("negative.npy", grey.astype(int) - 1)


def polygon(ring: list) -> dict:
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}


def region(ring: list) -> dict:
    return polygon(ring) | {"properties": {"classification": {"name": "Region*"}}}


def make_runs() -> None:
    """A run, its exports, and copies in which one thing is wrong."""
    assert run_command(["train", *WORDS["PLAIN"], "--out", "run"]) == 0
    run, state = Path("run"), "state/last.safetensors"
    export_run(run, Path("merged.safetensors"))
    export_run(run, Path("lora.safetensors"), format="adapter")
    assert (
        run_command(["predict", "run", "few/images", "--out", "again", "--formats", "labels"]) == 0
    )
    shutil.copytree("again", "results")
    record = json.loads(Path("results/predict.json").read_text())
    Path("results/predict.json").write_text(json.dumps(record | {"tta": True}))
    settings = (run / "config.toml").read_text()
    for name, old, new in (
        ("old", "[loss]", "[loss]\nhover = 1.0"),
        ("edited", "alpha = 8.0", "alpha = 4.0"),
        ("moved", 'root = "plain"', 'root = "nowhere"'),
        ("wide", "width = 32", "width = 64"),
    ):
        shutil.copytree("run", name)
        Path(name, "config.toml").write_text(settings.replace(old, new))
    Path("others/.locks").mkdir(parents=True)
    Path("others/.locks/folds").touch()
    Path("others/folds.toml").write_text(settings.replace("\nseed = 0", "\nseed = 3"))
    names = "begun half listed unfinished headless baseless torn swapped unlike stuck"
    for name in names.split():
        shutil.copytree("run", name)
    Path("begun/adapter.safetensors").unlink()
    Path("half/scores.json").write_text("{")
    Path("listed/scores.json").write_text("[]")
    Path("headless/scores.json").write_text("{}")
    Path("unfinished/metrics.jsonl").write_text('{"epoch": 1}')
    Path("torn", state).write_text("half of it")
    shutil.copy("run/adapter.safetensors", Path("swapped", state))
    rewrite("baseless/base.safetensors", lambda _, document: document.clear())
    rewrite(f"unlike/{state}", lambda tensors, _: tensors.pop(max(tensors)))
    rewrite(f"stuck/{state}", lambda _, document: document.pop("progress"))


def rewrite(name: str, change: Callable[[dict, dict], object]) -> None:
    tensors, document = checkpoint.read_tensors(Path(name))
    change(tensors, document)
    checkpoint.write_tensors(Path(name), tensors, document)


# ---- the tests ----


def cases(transcript: str) -> list:
    """Line and message of each entry, and what the user did as its id."""
    entries = re.findall(r"^[$>] (.*)  # (.*)\n((?:(?![$>] ).*\n)+)", transcript, re.MULTILINE)
    return [pytest.param(line, message, id=title) for line, title, message in entries]


def says(text: str, message: str) -> bool:
    """Whether a text is the message, with any text for `...`."""
    parts = re.split(r" ?\.\.\. ?", " ".join(message.split()))
    return bool(re.fullmatch(".*".join(map(re.escape, parts)), " ".join(text.split())))


@pytest.fixture
def scene(place, tmp_path, monkeypatch) -> Callable[[str], list[str]]:
    """Prepares what the capital words of a line name, and gives its other words."""

    def prepared(line: str) -> list[str]:
        words = line.replace("OUT", str(tmp_path)).split(" ")
        while words[0].isupper() or words[0].partition("=")[0].isupper():
            name, is_variable, value = words.pop(0).partition("=")
            if is_variable:
                monkeypatch.setenv(name, value)
            for target, stand_in in SCENES.get(name, {}).items():
                monkeypatch.setattr(target, stand_in)
        return [part for word in words for part in WORDS.get(word, [word])]

    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NUCSAM_CACHE", "cache")
    monkeypatch.setattr("urllib.request.urlopen", failing(URLError("Name or service not known")))
    return prepared


@pytest.mark.parametrize("line, message", cases(COMMANDS))
def test_a_mistake_is_one_message_and_leaves_nothing(line, message, scene, place, capsys):
    words, before = scene(line), snapshot(place)
    assert run_command(words) == 2
    printed = capsys.readouterr().err
    assert printed.count("nucsam: ") == 1 and "Traceback" not in printed
    assert says(printed.partition("nucsam: ")[2], message)
    shutil.rmtree(place / "cache", ignore_errors=True)
    assert snapshot(place) == before


@pytest.mark.parametrize("line, message", cases(CALLS))
def test_a_call_raises_its_message(line, message, scene, place):
    function, *arguments = scene(line)
    before = snapshot(place)
    with pytest.raises(UserError) as error:
        FUNCTIONS[function](*arguments)
    assert says(str(error.value), message)
    assert snapshot(place) == before


@pytest.mark.parametrize("line, remarks", cases(REMARKS))
def test_what_may_be_meant_is_done_and_remarked_on(line, remarks, scene, capsys, recwarn, tmp_path):
    assert run_command(scene(line)) == 0
    printed = "".join(capsys.readouterr())
    printed += "".join(warnings.formatwarning(w.message, w.category, "", 0) for w in recwarn)
    for remark in remarks.replace("OUT", str(tmp_path)).splitlines():
        assert says(printed, f"...{remark}...")


def test_masks_are_labelled_where_that_is_asked(scene, capsys):
    line = "evaluate --truth plain/labels --pred binary/labels --workers 1 --json -"
    scores = []
    for options in ("", " --connected"):
        assert run_command(scene(line + options)) == 0
        output = capsys.readouterr()
        scores.append(json.loads(output.out)["scores"][0]["summary"]["mean"]["aji"])
        assert ("a binary mask" in output.err) == (not options)
    assert scores[0] < scores[1]

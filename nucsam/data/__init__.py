"""Folders and files of images and labels. Importing this package does not load torch."""

from nucsam.data.folders import find_records
from nucsam.data.images import open_image, read_image, read_label, read_mpp
from nucsam.data.samples import read_sample

__all__ = ["find_records", "open_image", "read_image", "read_label", "read_mpp", "read_sample"]

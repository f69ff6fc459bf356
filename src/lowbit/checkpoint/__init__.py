"""What a model on disk is: locating it, reading it lazily, describing it, and writing one atomically."""

from lowbit.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lowbit.checkpoint.description import ModelDescription
from lowbit.checkpoint.files import FileRecord, hash_file, read_json_object, write_json
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.known_hashes import source_hashes
from lowbit.checkpoint.location import locate
from lowbit.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_path,
    read_manifest,
    update_quality,
    write_manifest,
)
from lowbit.checkpoint.safetensors import TensorInfo, read_header, write_safetensors
from lowbit.checkpoint.writer import PartialCheckpoint, check_output, partial_path

__all__ = [
    "MANIFEST_NAME",
    "Checkpoint",
    "FileRecord",
    "Journal",
    "Manifest",
    "ModelDescription",
    "PartialCheckpoint",
    "TensorInfo",
    "check_output",
    "hash_file",
    "locate",
    "manifest_path",
    "open_checkpoint",
    "partial_path",
    "read_header",
    "read_json_object",
    "read_manifest",
    "source_hashes",
    "update_quality",
    "write_json",
    "write_manifest",
    "write_safetensors",
]

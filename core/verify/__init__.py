"""Is a checkpoint what it should be? Three depths: structure, load, forward; and digests against the lock file."""

from regraft.core.verify.structure import Finding, check_structure, raise_findings, same_vocabulary

__all__ = ["Finding", "check_structure", "raise_findings", "same_vocabulary"]

//! The share: virtiofsd.

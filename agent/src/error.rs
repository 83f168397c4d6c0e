//! What goes wrong in the agent, in the terms a caller branches on.
//!
//! Kinds are gRPC's codes, so that [`crate::server`] only has to hand them on; texts are one sentence that names the thing.

use std::fmt::{self, Display};

use tonic::{Code, Status};

/// A failed operation; cheap to clone, because a repeated request gets the answer of the first.
#[derive(Debug, Clone)]
pub struct Error {
    code: Code,
    text: String,
}

/// The agent's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The agent's own failure.
    pub fn internal(text: impl Into<String>) -> Self {
        Self { code: Code::Internal, text: text.into() }
    }

    /// A request that can never succeed as it is.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self { code: Code::InvalidArgument, text: text.into() }
    }

    /// Something named in the request does not exist (any more).
    pub fn not_found(text: impl Into<String>) -> Self {
        Self { code: Code::NotFound, text: text.into() }
    }

    /// Something that the request would create exists.
    pub fn exists(text: impl Into<String>) -> Self {
        Self { code: Code::AlreadyExists, text: text.into() }
    }

    /// Not in this state.
    pub fn precondition(text: impl Into<String>) -> Self {
        Self { code: Code::FailedPrecondition, text: text.into() }
    }

    /// A wait ended without what was waited for.
    pub fn deadline(text: impl Into<String>) -> Self {
        Self { code: Code::DeadlineExceeded, text: text.into() }
    }

    /// There is no room for it at the moment.
    pub fn exhausted(text: impl Into<String>) -> Self {
        Self { code: Code::ResourceExhausted, text: text.into() }
    }

    /// The caller is not who it must be.
    pub fn denied(text: impl Into<String>) -> Self {
        Self { code: Code::PermissionDenied, text: text.into() }
    }

    /// The kind.
    pub fn code(&self) -> Code {
        self.code
    }

    /// Says what was being done when this happened.
    #[must_use]
    pub fn during(mut self, what: impl Display) -> Self {
        self.text = format!("{what}: {}", self.text);
        self
    }
}

impl Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Self::new(error.code, error.text)
    }
}

/// Turns foreign errors into [`Error`] with a sentence.
pub trait During<T> {
    /// An internal error that says what was being done.
    fn during<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Display> During<T> for std::result::Result<T, E> {
    fn during<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|error| Error::internal(format!("{}: {error}", what())))
    }
}

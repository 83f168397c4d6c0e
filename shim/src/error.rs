//! The shim's error: a kind that containerd branches on, and a chain of causes that a person reads.
//!
//! Kinds are the gRPC codes that containerd gives a meaning to. Only `service` turns them into ttrpc codes.

use std::fmt;

/// What containerd may conclude from a failure; each is the gRPC code of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The container, exec or process is not there, or has exited already (for `Kill`).
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// The object is not in the state that the request needs.
    FailedPrecondition,
    /// The request, the spec, the configuration or an annotation is wrong.
    InvalidArgument,
    /// The guest or a helper is gone.
    Unavailable,
    /// A wait ended without what was awaited.
    DeadlineExceeded,
    /// Bulkhead does not offer this.
    Unimplemented,
    /// Everything else.
    Internal,
}

/// A failed request: its [`Kind`], and the causes from the outermost inwards (`{:#}` prints them on one line).
pub struct Error {
    kind: Kind,
    cause: anyhow::Error,
}

/// Result of everything that a request can reach.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` that says `message`.
    pub fn new(kind: Kind, message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self { kind, cause: anyhow::Error::msg(message) }
    }

    /// What containerd may conclude.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The same error, told as part of `context`.
    #[must_use]
    pub fn context(self, context: impl fmt::Display + Send + Sync + 'static) -> Self {
        Self { kind: self.kind, cause: self.cause.context(context) }
    }

    /// The same error, with `cause` as the innermost of its causes.
    #[must_use]
    pub fn because(self, cause: impl fmt::Display) -> Self {
        Self::new(self.kind, format!("{self}: {cause}"))
    }

    /// [`Kind::NotFound`].
    pub fn not_found(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// [`Kind::AlreadyExists`].
    pub fn already_exists(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::AlreadyExists, message)
    }

    /// [`Kind::FailedPrecondition`].
    pub fn failed_precondition(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }

    /// [`Kind::InvalidArgument`].
    pub fn invalid(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::InvalidArgument, message)
    }

    /// [`Kind::Unavailable`].
    pub fn unavailable(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    /// [`Kind::DeadlineExceeded`].
    pub fn deadline(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::DeadlineExceeded, message)
    }

    /// [`Kind::Unimplemented`].
    pub fn unimplemented(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::Unimplemented, message)
    }

    /// [`Kind::Internal`].
    pub fn internal(message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(Kind::Internal, message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {:#}", self.kind, self.cause)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The chain is printed once and whole: whoever shows this error to a user has only this one string.
        write!(f, "{:#}", self.cause)
    }
}

/// A cause without a kind is [`Kind::Internal`], unless a cause in its chain is an [`Error`] of another kind.
impl From<anyhow::Error> for Error {
    fn from(cause: anyhow::Error) -> Self {
        let kind = cause.downcast_ref::<Self>().map_or(Kind::Internal, Self::kind);
        Self { kind, cause }
    }
}

impl std::error::Error for Error {}

/// Gives a plain failure its kind and context.
pub trait WithKind<T> {
    /// Turns the error into an [`Error`] of `kind`, told as part of `context`.
    fn or_kind(self, kind: Kind, context: impl fmt::Display + Send + Sync + 'static) -> Result<T>;
}

impl<T, E: Into<anyhow::Error>> WithKind<T> for std::result::Result<T, E> {
    fn or_kind(self, kind: Kind, context: impl fmt::Display + Send + Sync + 'static) -> Result<T> {
        self.map_err(|error| Error { kind, cause: error.into().context(context) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_told_once_from_the_outside_in() {
        let error = Error::invalid("no such file").context("read spec").context("create container web");
        assert_eq!(error.to_string(), "create container web: read spec: no such file");
        assert_eq!(error.kind(), Kind::InvalidArgument);
    }

    #[test]
    fn what_led_to_an_error_is_told_last() {
        let error = Error::unavailable("QEMU has ended").context("boot").because("memory ran out");
        assert_eq!(error.to_string(), "boot: QEMU has ended: memory ran out");
        assert_eq!(error.kind(), Kind::Unavailable);
    }

    #[test]
    fn a_kind_survives_the_way_through_anyhow() {
        let inner: anyhow::Error = Error::unavailable("agent is gone").into();
        assert_eq!(Error::from(inner.context("exec")).kind(), Kind::Unavailable);
        assert_eq!(Error::from(anyhow::anyhow!("plain")).kind(), Kind::Internal);
    }
}

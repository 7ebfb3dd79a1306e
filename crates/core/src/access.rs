//! Who may use which key for what, and who did: asked at every use of a key, of a cached one too.

mod gate;
mod rights;

pub use gate::{Admitted, Function, Gate, Interrupted, Journal, Outcome, Party, Seen, Tally, Use};
pub use rights::{Privilege, Rights};

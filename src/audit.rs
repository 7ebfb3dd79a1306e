//! The audit: what the gate counted becomes records, in the server's log or, through a queue on disk, in a table.
//!
//! Where a record is required, it is announced before anything is decrypted or encrypted, and what is announced is on
//! disk. So whatever kills this process, or the server, leaves at least the announcement.

mod entry;
mod queue;
pub mod worker;

use std::cell::RefCell;
use std::rc::Rc;

use pgrx::pg_sys;
use vod_tender_core::access::{Gate, Journal, Outcome, Tally, Use};
use vod_tender_core::{Error, Result};

use crate::callers::Callers;
use crate::server_log::{self, Level};
use crate::settings::{self, AuditMode};
use crate::{backend, process};
use entry::Ending;
use queue::Queue;

/// This backend's part of the audit.
#[derive(Default)]
pub struct Audit {
    /// Who calls.
    pub callers: Callers,
    queue: Queue,
    /// Number of the last record of this backend.
    number: u64,
}

/// Announces uses for the gate.
pub struct Announcer(pub Rc<RefCell<Audit>>);

impl Journal for Announcer {
    fn announce(&mut self, used: &Use) -> Result<Option<u64>> {
        if !settings::audit_required() || mode() == AuditMode::Off {
            return Ok(None);
        }
        self.0.borrow_mut().announce(used).map(Some)
    }
}

/// Waits until the worker has stored what is queued by now. On a standby there is no worker, and nothing is waited for.
pub fn flush() -> Result<bool> {
    // SAFETY: reads a flag of the server's.
    if unsafe { pg_sys::RecoveryInProgress() } {
        return Ok(false);
    }
    let failed = |error: std::io::Error| Error::NotAudited(error.to_string());
    let request = backend::with_audit(|audit| audit.queue.request())?.map_err(failed)?;
    while !backend::with_audit(|audit| audit.queue.is_done(&request))? {
        process::sleep_interruptibly(POLL);
    }
    Ok(true)
}

/// Bytes of the queue that no session writes any more and that are older than this.
pub fn waiting_bytes(age: std::time::Duration) -> u64 {
    queue::waiting_bytes(age)
}

/// How often [`flush`] looks.
const POLL: std::time::Duration = std::time::Duration::from_millis(10);

/// Where records go. A standby cannot write the table, so that they go to its log.
fn mode() -> AuditMode {
    match settings::audit() {
        // SAFETY: reads a flag of the server's.
        AuditMode::Table if unsafe { pg_sys::RecoveryInProgress() } => AuditMode::Log,
        mode => mode,
    }
}

impl Audit {
    fn announce(&mut self, used: &Use) -> Result<u64> {
        self.number += 1;
        let entry = self.entry(used, &Tally::default(), Ending::Unknown);
        match mode() {
            AuditMode::Table => self
                .queue
                .append(&queue::line(queue::BEGIN, self.number, &entry), true)
                .map_err(|error| Error::NotAudited(error.to_string()))?,
            _ => server_log::write(Level::Note, &format!("vod_tender_crypto audit begins: {entry}")),
        }
        Ok(self.number)
    }

    /// Writes down what the transaction used. Cannot fail: what cannot be queued goes to the log.
    pub fn end_transaction(&mut self, gate: &mut Gate, committed: bool) {
        if gate.is_empty() {
            self.callers.take();
            return;
        }
        self.alarms(gate);
        let uses = gate.take();
        let mut lines = String::new();
        let mut entries = Vec::new();
        for (used, tally) in uses.iter().filter(|(used, tally)| used.outcome != Outcome::Honey && is_of_interest(tally))
        {
            let number = tally.announced.unwrap_or_else(|| {
                self.number += 1;
                self.number
            });
            let entry = self.entry(used, tally, Ending::Known { committed });
            lines.push_str(&queue::line(queue::END, number, &entry));
            entries.push(entry);
        }
        self.callers.take();
        if entries.is_empty() {
            return;
        }
        match mode() {
            AuditMode::Off => {}
            AuditMode::Log => log_all(&entries),
            AuditMode::Table => match self.queue.append(&lines, false) {
                Ok(()) => self.queue.end_transaction(),
                Err(error) => {
                    let why = entry::ascii(&error.to_string());
                    server_log::write(Level::Alarm, &format!("vod_tender_crypto audit could not be queued: {why}"));
                    log_all(&entries);
                }
            },
        }
    }

    /// Raises the alarms for honey values, at once and whatever is audited otherwise.
    pub fn alarms(&mut self, gate: &mut Gate) {
        for used in gate.take_alarms() {
            let entry = self.entry(&used, &Tally { values: 1, ..Tally::default() }, Ending::Unknown);
            server_log::write(Level::Alarm, &format!("vod_tender_crypto honey value was asked for: {entry}"));
            if mode() == AuditMode::Table {
                self.number += 1;
                let line = queue::line(queue::END, self.number, &entry);
                if self.queue.append(&line, settings::audit_required()).is_ok() {
                    self.queue.end_transaction();
                }
            }
        }
    }

    fn entry(&self, used: &Use, tally: &Tally, ending: Ending) -> String {
        entry::json(self.callers.caller(used.party), used, tally, ending)
    }
}

fn is_of_interest(tally: &Tally) -> bool {
    tally.values > 0 || tally.announced.is_some()
}

fn log_all(entries: &[String]) {
    for entry in entries {
        server_log::write(Level::Note, &format!("vod_tender_crypto audit: {entry}"));
    }
}

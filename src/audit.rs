//! The audit: what the gate counted becomes records, in the server's log or, through a queue on disk, in a table.
//!
//! Where a record is required, it is announced before anything is decrypted or encrypted, and what is announced is on
//! disk. So whatever kills this process, or the server, leaves at least the announcement.

mod entry;
mod queue;
pub mod worker;

use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::{Duration, Instant};

use pgrx::pg_sys;
use vod_tender_core::access::{Gate, Journal, Tally, Use};
use vod_tender_core::stored::Kind;
use vod_tender_core::{Error, Result};

use crate::callers::Callers;
use crate::errors::sqlstate_text;
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
    /// What was announced in the queue and has not ended.
    open: HashSet<u64>,
}

/// Announces uses for the gate.
pub struct Announcer(pub Rc<RefCell<Audit>>);

impl Journal for Announcer {
    fn sqlstate(&self, error: &Error) -> String {
        sqlstate_text(error, Kind::Text)
    }

    fn announce(&mut self, used: &Use) -> Result<Option<u64>> {
        if !settings::audit_required() {
            return Ok(None);
        }
        if mode() == AuditMode::Off {
            return Err(Error::NotAudited("vod_tender_crypto.audit is off".to_owned()));
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
    let began = Instant::now();
    let mut told = false;
    while !backend::with_audit(|audit| audit.queue.is_done(&request))? {
        if began.elapsed() > GIVES_UP {
            let _ = std::fs::remove_file(&request);
            return Err(Error::NotAudited("no background worker has stored it within a minute".to_owned()));
        }
        if !told && began.elapsed() > TELLS {
            told = true;
            pgrx::notice!("waiting for the audit's background worker: see the server's log, and max_worker_processes");
        }
        process::sleep_interruptibly(POLL);
    }
    Ok(true)
}

/// How often [`flush`] looks, when it says that it waits, and when it gives up.
const POLL: Duration = Duration::from_millis(10);
const TELLS: Duration = Duration::from_secs(5);
const GIVES_UP: Duration = Duration::from_secs(60);

/// Bytes of the queue that wait for longer than this.
pub fn waiting_bytes(age: Duration) -> u64 {
    queue::waiting_bytes(age)
}

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
        let number = self.next_number();
        let entry = self.entry(used, &Tally::default(), Ending::Unknown);
        if mode() == AuditMode::Table {
            let line = queue::line(queue::BEGIN, number, &entry);
            self.queue.append(&line, true).map_err(|error| Error::NotAudited(error.to_string()))?;
            self.open.insert(number);
        } else {
            server_log::write(Level::Note, &format!("vod_tender_crypto audit begins: {entry}"));
        }
        Ok(number)
    }

    /// Writes down what the transaction that ends has used.
    pub fn end_transaction(&mut self, gate: &mut Gate, committed: Option<bool>) {
        self.write(gate, committed);
        self.callers.forget();
    }

    /// Writes down what was used so far: at the end of the transaction, and before that where it uses very much. Cannot fail:
    /// what cannot be queued goes to the log.
    pub fn write(&mut self, gate: &mut Gate, committed: Option<bool>) {
        self.alarms(gate);
        let uses = gate.take();
        let mut queued = String::new();
        let mut entries = Vec::new();
        for (used, tally) in uses.iter().filter(|(_, tally)| is_of_interest(tally)) {
            let entry = self.entry(used, tally, Ending::Known { committed });
            // What was announced in the queue ends there, whatever the setting says by now.
            let announced = tally.announced.filter(|number| self.open.remove(number));
            if announced.is_some() || mode() == AuditMode::Table {
                let number = announced.unwrap_or_else(|| self.next_number());
                queued.push_str(&queue::line(queue::END, number, &entry));
                entries.push(entry);
            } else if mode() == AuditMode::Log {
                log(&entry);
            }
        }
        if queued.is_empty() {
            return;
        }
        match self.queue.append(&queued, false) {
            Ok(()) => self.queue.rotate(),
            Err(error) => {
                let why = entry::ascii(&error.to_string());
                server_log::write(Level::Alarm, &format!("vod_tender_crypto audit could not be queued: {why}"));
                entries.iter().for_each(|entry| log(entry));
            }
        }
        self.queue.call_worker();
    }

    /// Raises the alarms for honey values at once, whatever is audited otherwise, and sees to it that the record will be
    /// there. Of many in one transaction the first, the tenth, the hundredth and so on are in the log.
    pub fn alarms(&mut self, gate: &mut Gate) {
        for (used, tally) in gate.take_alarms() {
            if tally.values >= tally.alarmed.saturating_mul(10).max(1) {
                tally.alarmed = 10u64.pow(tally.values.ilog10());
                let entry = self.entry(&used, tally, Ending::Unknown);
                server_log::write(Level::Alarm, &format!("vod_tender_crypto honey value was asked for: {entry}"));
            }
            if tally.announced.is_none() && mode() == AuditMode::Table {
                let number = self.next_number();
                let line = queue::line(queue::BEGIN, number, &self.entry(&used, tally, Ending::Unknown));
                if self.queue.append(&line, settings::audit_required()).is_ok() {
                    self.open.insert(number);
                    tally.announced = Some(number);
                    self.queue.call_worker();
                }
            }
        }
    }

    fn next_number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn entry(&self, used: &Use, tally: &Tally, ending: Ending) -> String {
        entry::json(self.callers.caller(used.party), used, tally, ending)
    }
}

fn is_of_interest(tally: &Tally) -> bool {
    tally.values > 0 || tally.announced.is_some()
}

fn log(entry: &str) {
    server_log::write(Level::Note, &format!("vod_tender_crypto audit: {entry}"));
}

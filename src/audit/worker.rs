//! The background worker that moves one database's queue into the table. Started when there is something to do; ends
//! when there was nothing for a while, so that it does not keep anybody from dropping the database.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, SignalWakeFlags};
use pgrx::prelude::*;
use pgrx::{IntoDatum, pg_sys};

use crate::audit::{entry, queue};

/// How often the worker looks.
const PAUSE: Duration = Duration::from_millis(100);
/// After so many looks at an empty queue it ends.
const IDLE_LOOKS: u32 = 20;
/// So many times it tries to become the only one.
const LOCK_TRIES: u32 = 10;
/// Read at a time from one file.
const CHUNK_BYTES: u64 = 1 << 20;

/// Asks the postmaster for a worker. It may have no room for one; whoever writes next asks again.
pub fn start(database: pg_sys::Oid) {
    let _ = BackgroundWorkerBuilder::new("vod_tender_crypto audit")
        .set_type("vod_tender_crypto audit")
        .set_library("vod_tender_crypto")
        .set_function("vod_tender_crypto_audit_worker")
        .set_argument(database.into_datum())
        .set_restart_time(None)
        .enable_spi_access()
        .load_dynamic();
}

/// The worker's main function.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn vod_tender_crypto_audit_worker(database: pg_sys::Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    let database = pg_sys::Oid::from(database.value() as u32);
    let directory = queue::directory(database);
    let Some(_lock) = become_the_only_one(&directory) else { return };
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(database), None);
    // A file is removed once its records are stored: they must then be on disk, whatever other transactions are content
    // with.
    // SAFETY: a setting of PostgreSQL's own with a value that it takes.
    unsafe {
        pg_sys::SetConfigOption(
            c"synchronous_commit".as_ptr(),
            c"on".as_ptr(),
            pg_sys::GucContext::PGC_USERSET,
            pg_sys::GucSource::PGC_S_OVERRIDE,
        );
    }
    let mut reader = Reader::default();
    let mut idle = 0;
    while idle < IDLE_LOOKS {
        match reader.pass(&directory) {
            Ok(0) => idle += 1,
            Ok(_) => {
                idle = 0;
                continue;
            }
            Err(error) => {
                pgrx::warning!("vod_tender_crypto audit worker: {error}");
                idle += 1;
            }
        }
        if !BackgroundWorker::wait_latch(Some(PAUSE)) {
            return;
        }
    }
}

/// The lock that one worker of a database holds. A backend that looks whether there is a worker holds it for a moment.
fn become_the_only_one(directory: &Path) -> Option<File> {
    queue::make_directory(directory).ok()?;
    let lock = queue::open_worker_lock(directory).ok()?;
    for _ in 0..LOCK_TRIES {
        if lock.try_lock().is_ok() {
            return Some(lock);
        }
        if !BackgroundWorker::wait_latch(Some(Duration::from_millis(20))) {
            return None;
        }
    }
    None
}

/// What was read of the queue.
#[derive(Default)]
struct Reader {
    files: HashMap<PathBuf, Progress>,
}

/// How far a file was read.
struct Progress {
    file: File,
    offset: u64,
    /// What was announced and has not come.
    announced: BTreeMap<i64, String>,
}

/// A record on its way into the table.
struct Record {
    source: String,
    number: i64,
    entry: String,
}

impl Reader {
    /// Reads what is there, stores it, and removes what is done with. Gives the number of bytes read and files removed.
    fn pass(&mut self, directory: &Path) -> io::Result<u64> {
        let mut requests = Vec::new();
        let mut finished = Vec::new();
        let mut records = Vec::new();
        let mut read = 0;
        let mut paths: Vec<_> = fs::read_dir(directory)?.filter_map(|file| Some(file.ok()?.path())).collect();
        paths.sort();
        // What is requested was written before: so requests are looked for first.
        requests.extend(paths.iter().filter(|path| has_suffix(path, queue::REQUEST)).cloned());
        let mut complete = true;
        for path in paths.iter().filter(|path| has_suffix(path, queue::SUFFIX)) {
            let progress = match self.files.get_mut(path) {
                Some(progress) => progress,
                None => self.files.entry(path.clone()).or_insert(Progress::open(path)?),
            };
            // In this order: what its owner wrote before it ended is then read.
            let is_over = progress.file.try_lock().is_ok();
            let source = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let bytes = progress.read(&source, is_over, &mut records)?;
            read += bytes;
            complete &= bytes < CHUNK_BYTES;
            if is_over && bytes == 0 {
                progress.abandon(&source, &mut records);
                finished.push(path.clone());
            }
        }
        store(&records);
        for path in finished {
            self.files.remove(&path);
            fs::remove_file(path)?;
            read += 1;
        }
        if complete {
            requests.into_iter().try_for_each(fs::remove_file)?;
        }
        Ok(read)
    }
}

fn has_suffix(path: &Path, suffix: &str) -> bool {
    path.to_string_lossy().ends_with(suffix)
}

impl Progress {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Progress { file: File::open(path)?, offset: 0, announced: BTreeMap::new() })
    }

    /// Reads whole lines; of a file that is over, the rest too. Gives the number of bytes.
    fn read(&mut self, source: &str, is_over: bool, records: &mut Vec<Record>) -> io::Result<u64> {
        self.file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        (&self.file).take(CHUNK_BYTES).read_to_end(&mut bytes)?;
        let end = match bytes.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None if is_over || bytes.len() as u64 == CHUNK_BYTES => bytes.len(),
            None => 0,
        };
        for line in bytes[..end].split_inclusive(|&byte| byte == b'\n') {
            match parse(line) {
                Some((queue::BEGIN, number, entry)) => {
                    self.announced.insert(number, entry.to_owned());
                }
                Some((_, number, entry)) => {
                    self.announced.remove(&number);
                    records.push(Record { source: source.to_owned(), number, entry: entry.to_owned() });
                }
                // Written by nobody, or cut off when the server's machine stopped.
                None => records.push(Record {
                    source: source.to_owned(),
                    number: -1 - self.offset as i64,
                    entry: format!(r#"{{"outcome":"unreadable","bytes":{}}}"#, line.len()),
                }),
            }
            self.offset += line.len() as u64;
        }
        Ok(end as u64)
    }

    /// What was announced and will not come any more.
    fn abandon(&mut self, source: &str, records: &mut Vec<Record>) {
        let announced = std::mem::take(&mut self.announced).into_iter();
        records.extend(announced.map(|(number, entry)| Record { source: source.to_owned(), number, entry }));
    }
}

/// State, number and entry of a line.
fn parse(line: &[u8]) -> Option<(&str, i64, &str)> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (state, rest) = line.split_once(' ')?;
    let (number, entry) = rest.split_once(' ')?;
    let is_known = [queue::BEGIN, queue::END].contains(&state) && entry.is_ascii();
    serde_json::from_str::<serde::de::IgnoredAny>(entry).ok().filter(|_| is_known)?;
    Some((state, number.parse().ok()?, entry))
}

/// Writes records into the table, in one transaction.
fn store(records: &[Record]) {
    if records.is_empty() {
        return;
    }
    let sources: Vec<_> = records.iter().map(|record| record.source.clone()).collect();
    let numbers: Vec<_> = records.iter().map(|record| record.number).collect();
    let entries: Vec<_> = records.iter().map(|record| entry::ascii(&record.entry)).collect();
    BackgroundWorker::transaction(AssertUnwindSafe(move || {
        let stored = Spi::get_one_with_args::<i64>(
            "SELECT vod_tender_crypto.store_audit($1, $2, $3)",
            &[sources.into(), numbers.into(), entries.into()],
        );
        if let Err(error) = stored {
            pgrx::error!("vod_tender_crypto audit worker could not store records: {error}");
        }
    }));
}

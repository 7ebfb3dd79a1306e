//! The background worker that moves one database's queue into the table. Started when there is something to do; ends
//! when there was nothing for a while, so that it does not keep anybody from dropping the database.

use std::collections::{BTreeMap, HashMap, HashSet};
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
/// Records in one transaction.
const BATCH: usize = 5000;

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
    let Some(mut lock) = become_the_only_one(&directory) else { return };
    BackgroundWorker::connect_worker_to_spi_by_oid(Some(database), None);
    keep_settings_out();
    let mut reader = Reader::default();
    loop {
        if !work_until_idle(&mut reader, &directory, &lock) {
            return;
        }
        drop(lock);
        // Whoever wrote while the lock was held has called nobody; whoever writes from now on calls a worker.
        if !reader.has_news(&directory) {
            return;
        }
        match become_the_only_one(&directory) {
            Some(again) => lock = again,
            None => return,
        }
    }
}

/// Settings of the server or the database must not keep the worker from its work. A file is removed once its records are
/// stored: they must then be on disk, whatever other transactions are content with.
fn keep_settings_out() {
    for (name, value) in [
        (c"role", c"none"),
        (c"search_path", c"pg_catalog, pg_temp"),
        (c"plpgsql.extra_errors", c"none"),
        (c"synchronous_commit", c"on"),
        (c"default_transaction_read_only", c"off"),
        (c"default_transaction_isolation", c"read committed"),
        (c"lock_timeout", c"0"),
        (c"statement_timeout", c"0"),
        (c"session_replication_role", c"origin"),
    ] {
        let (context, source) = (pg_sys::GucContext::PGC_SUSET, pg_sys::GucSource::PGC_S_OVERRIDE);
        // SAFETY: settings of PostgreSQL's own with values that it takes.
        unsafe { pg_sys::SetConfigOption(name.as_ptr(), value.as_ptr(), context, source) };
    }
}

/// Works until there was nothing to do for a while. `false` when the worker shall end.
fn work_until_idle(reader: &mut Reader, directory: &Path, lock: &File) -> bool {
    let mut idle = 0;
    while idle < IDLE_LOOKS {
        match reader.pass(directory) {
            Ok(done) => {
                // When the doctor asks, this says until when everything was read.
                let _ = lock.set_modified(std::time::SystemTime::now());
                idle = if done == 0 { idle + 1 } else { 0 };
                if done > 0 {
                    continue;
                }
            }
            Err(error) => {
                pgrx::warning!("vod_tender_crypto audit worker: {error}");
                idle += 1;
            }
        }
        if !BackgroundWorker::wait_latch(Some(PAUSE)) {
            return false;
        }
    }
    true
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
    /// Files that could not be read when they were last looked at.
    failing: HashSet<PathBuf>,
}

/// How far a file was read. It is opened anew each time: there may be more files than a process may open.
#[derive(Default)]
struct Progress {
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

/// What reading a file has brought.
struct Found {
    bytes: u64,
    /// Whether there may be more of it.
    is_full: bool,
    /// Whether nobody will write it any more.
    is_over: bool,
}

impl Reader {
    /// Reads what is there, stores it, and removes what is done with. Gives the number of bytes read and files removed.
    fn pass(&mut self, directory: &Path) -> io::Result<u64> {
        let mut finished = Vec::new();
        let mut records = Vec::new();
        let mut done = 0;
        // What is requested was written before: so requests are looked for first.
        let requests = list(directory, queue::REQUEST)?;
        let paths = list(directory, queue::SUFFIX)?;
        let mut complete = true;
        for path in &paths {
            let progress = self.files.entry(path.clone()).or_default();
            let source = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            match progress.read(path, &source, &mut records) {
                Ok(found) => {
                    done += found.bytes;
                    self.failing.remove(path);
                    // What a file that is over has announced is stored with the next look.
                    complete &= !(found.is_full || found.is_over && found.bytes > 0);
                    if found.is_over && found.bytes == 0 {
                        progress.abandon(&source, &mut records);
                        finished.push(path.clone());
                    }
                }
                // One file's trouble must not hold up the others, nor lose what was read of them.
                Err(error) => {
                    complete = false;
                    if self.failing.insert(path.clone()) {
                        pgrx::warning!("vod_tender_crypto audit worker: {}: {error}", path.display());
                    }
                }
            }
        }
        for batch in records.chunks(BATCH) {
            store(batch);
        }
        for path in finished {
            self.files.remove(&path);
            fs::remove_file(path)?;
            done += 1;
        }
        if complete {
            requests.iter().for_each(|request| drop(fs::remove_file(request)));
        }
        Ok(done)
    }
}

impl Reader {
    /// Whether there is something that was not read.
    fn has_news(&self, directory: &Path) -> bool {
        let files = fs::read_dir(directory).into_iter().flatten().flatten();
        let is_news = |path: PathBuf| {
            let read = self.files.get(&path).map_or(0, |progress| progress.offset);
            let length = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let is_unread = has_suffix(&path, queue::SUFFIX) && !self.failing.contains(&path) && length > read;
            has_suffix(&path, queue::REQUEST) || is_unread
        };
        files.map(|file| file.path()).any(is_news)
    }
}

/// The directory's files of one kind, in the order of their names.
fn list(directory: &Path, suffix: &str) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(directory)?.map(|file| Ok(file?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| has_suffix(path, suffix));
    paths.sort();
    Ok(paths)
}

fn has_suffix(path: &Path, suffix: &str) -> bool {
    path.to_string_lossy().ends_with(suffix)
}

impl Progress {
    /// Reads whole lines; of a file that is over, the rest too.
    fn read(&mut self, path: &Path, source: &str, records: &mut Vec<Record>) -> io::Result<Found> {
        let mut file = File::open(path)?;
        // In this order: what its owner wrote before it ended is then read.
        let is_over = file.try_lock_shared().is_ok();
        // Its owner took back what it could not write as a whole. What was stored is not stored again.
        if file.metadata()?.len() < self.offset {
            *self = Progress::default();
        }
        file.seek(SeekFrom::Start(self.offset))?;
        let mut bytes = Vec::new();
        file.take(CHUNK_BYTES).read_to_end(&mut bytes)?;
        let is_full = bytes.len() as u64 == CHUNK_BYTES;
        let end = match bytes.iter().rposition(|&byte| byte == b'\n') {
            Some(end) => end + 1,
            None if is_over || is_full => bytes.len(),
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
        Ok(Found { bytes: end as u64, is_full, is_over })
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
    // SAFETY: returns a static.
    let is_utf8 = unsafe { pg_sys::GetDatabaseEncoding() } == pg_sys::pg_enc::PG_UTF8 as i32;
    let sources: Vec<_> = records.iter().map(|record| record.source.clone()).collect();
    let numbers: Vec<_> = records.iter().map(|record| record.number).collect();
    let times: Vec<_> = records.iter().map(|record| entry::time(&record.entry)).collect();
    let readable = |text: &String| if is_utf8 { text.clone() } else { entry::without_escapes(text) };
    let entries: Vec<_> = records.iter().map(|record| readable(&record.entry)).collect();
    BackgroundWorker::transaction(AssertUnwindSafe(move || {
        let stored = Spi::get_one_with_args::<i64>(
            "SELECT vod_tender_crypto.store_audit($1, $2, $3, $4)",
            &[sources.into(), numbers.into(), times.into(), entries.into()],
        );
        if let Err(error) = stored {
            pgrx::error!("vod_tender_crypto audit worker could not store records: {error}");
        }
    }));
}

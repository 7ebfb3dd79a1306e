//! The queue between backends and the worker that writes the table: one file for each backend, in the data directory.
//!
//! A file and not shared memory: it outlives a crash of the server, needs no `shared_preload_libraries`, and takes records
//! of transactions that are read-only or rolled back. A backend holds a lock on its file for as long as it lives, so that
//! the worker knows which files nobody will write any more.

use std::ffi::CStr;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pgrx::pg_sys;

use crate::audit::worker;
use crate::{process, settings};

/// First word of a line that announces a record, and of one that is the record.
pub const BEGIN: &str = "begin";
pub const END: &str = "end";

/// End of the name of a file that can be read.
pub const SUFFIX: &str = ".audit";
/// End of the name of one that is being made.
pub const UNFINISHED: &str = ".new";
/// End of the name of a request to read everything.
pub const REQUEST: &str = ".flush";

/// The file that a worker locks, and touches when it has read everything.
const WORKER_LOCK: &str = "worker.lock";

/// After so many bytes a backend begins another file, and the worker can remove this one.
const FILE_BYTES: u64 = 64 * 1024;

/// How long a worker that was asked for is not asked for again.
const PATIENCE: Duration = Duration::from_millis(500);

/// One line.
pub fn line(state: &str, number: u64, entry: &str) -> String {
    format!("{state} {number} {entry}\n")
}

/// Where the files of a database are.
pub fn directory(database: pg_sys::Oid) -> PathBuf {
    // SAFETY: a C string that the server sets before it starts any process.
    let data = unsafe { CStr::from_ptr(pg_sys::DataDir) };
    let data: &std::ffi::OsStr = std::os::unix::ffi::OsStrExt::from_bytes(data.to_bytes());
    Path::new(data).join("vod_tender_crypto").join("audit").join(database.to_u32().to_string())
}

/// Makes the directory, for the server's user only.
pub fn make_directory(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// The file that a worker locks for as long as it works.
pub fn open_worker_lock(directory: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(directory.join(WORKER_LOCK))
}

/// This backend's end of the queue.
#[derive(Default)]
pub struct Queue {
    file: Option<(File, u64)>,
    /// Whether the file's name is on disk.
    is_named_on_disk: bool,
    /// Number of files made so far.
    files: u64,
    worker_lock: Option<File>,
    asked: Option<Instant>,
}

impl Queue {
    /// Appends whole lines, or nothing. With `durable` they are on disk when it returns.
    pub fn append(&mut self, lines: &str, durable: bool) -> io::Result<()> {
        let (file, length) = match self.file.take() {
            Some(open) => open,
            None => (self.open()?, 0),
        };
        // SAFETY: reads a setting of the server's.
        let flushes = durable && unsafe { pg_sys::enableFsync };
        let written = reserve(&file, length, lines.len() as u64)
            .and_then(|()| (&file).write_all(lines.as_bytes()))
            .and_then(|()| if flushes { self.flush(&file) } else { Ok(()) });
        if let Err(error) = written {
            // Neither half a line nor one that was refused may stay. If it does, the file is left: it ends there.
            if file.set_len(length).is_ok() {
                self.file = Some((file, length));
            }
            return Err(error);
        }
        self.file = Some((file, length + lines.len() as u64));
        Ok(())
    }

    /// Says that nothing announced is open: the next record may be in another file.
    pub fn rotate(&mut self) {
        if self.file.as_ref().is_some_and(|(_, length)| *length > FILE_BYTES) {
            self.file = None;
        }
    }

    fn open(&mut self) -> io::Result<File> {
        let directory = directory(database());
        make_directory(&directory)?;
        check_room(&directory)?;
        self.files += 1;
        // SAFETY: set when the process begins.
        let began = unsafe { pg_sys::MyStartTimestamp };
        let name = format!("{}-{began}-{}", process::id(), self.files);
        let unfinished = directory.join(format!("{name}{UNFINISHED}"));
        let file = OpenOptions::new().create_new(true).append(true).mode(0o600).open(&unfinished)?;
        // Locked before it can be seen: a file without a lock is one that nobody writes.
        file.try_lock().map_err(io::Error::from)?;
        fs::rename(unfinished, directory.join(format!("{name}{SUFFIX}")))?;
        self.is_named_on_disk = false;
        Ok(file)
    }

    /// Puts the file on disk, and once its name and those of its directories.
    fn flush(&mut self, file: &File) -> io::Result<()> {
        file.sync_data()?;
        if !self.is_named_on_disk {
            // The database's directory, and the two above it that are ours.
            for directory in directory(database()).ancestors().take(4) {
                File::open(directory)?.sync_all()?;
            }
            self.is_named_on_disk = true;
        }
        Ok(())
    }

    /// Says that there is something to read: starts the database's worker unless it works.
    pub fn call_worker(&mut self) {
        if self.worker_lock.is_none() {
            self.worker_lock = open_worker_lock(&directory(database())).ok();
        }
        let Some(lock) = &self.worker_lock else { return };
        match lock.try_lock_shared() {
            Ok(()) => {
                let _ = lock.unlock();
                if self.asked.is_none_or(|asked| asked.elapsed() > PATIENCE) {
                    self.asked = Some(Instant::now());
                    worker::start(database());
                }
            }
            Err(TryLockError::WouldBlock | TryLockError::Error(_)) => {}
        }
    }

    /// Asks the worker to read everything that is in the queue by now. Gives the file that is there until it has.
    pub fn request(&mut self) -> io::Result<PathBuf> {
        let directory = directory(database());
        make_directory(&directory)?;
        self.files += 1;
        let request = directory.join(format!("{}-{}{REQUEST}", process::id(), self.files));
        OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&request)?;
        Ok(request)
    }

    /// Whether the request is done; sees to it that somebody works on it.
    pub fn is_done(&mut self, request: &Path) -> bool {
        let done = !request.exists();
        if !done {
            self.call_worker();
        }
        done
    }
}

/// Sees to it that a write does not end half-way for want of room, which a reader would see.
fn reserve(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::KEEP_SIZE, offset, bytes) {
        // A file system that cannot do that.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        reserved => Ok(reserved?),
    }
}

/// Fails when the files that nobody has read yet take more room than the setting allows.
fn check_room(directory: &Path) -> io::Result<()> {
    let mut bytes = 0;
    for file in fs::read_dir(directory)? {
        // A file may go while this looks.
        bytes += file?.metadata().map_or(0, |metadata| metadata.len());
    }
    if bytes > settings::audit_queue_bytes() {
        let why = "the audit queue is full: no background worker has written it to the table";
        return Err(io::Error::new(io::ErrorKind::StorageFull, why));
    }
    Ok(())
}

/// Bytes in files that were written longer ago than this, and that no worker has read since.
pub fn waiting_bytes(age: Duration) -> u64 {
    let directory = directory(database());
    let modified = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let read = modified(&directory.join(WORKER_LOCK));
    let waits = |path: &PathBuf| {
        let written = modified(path).filter(|_| path.to_string_lossy().ends_with(SUFFIX));
        written.is_some_and(|written| Some(written) > read && written.elapsed().is_ok_and(|since| since > age))
    };
    let files = fs::read_dir(&directory).into_iter().flatten().flatten().map(|file| file.path());
    files.filter(waits).map(|path| fs::metadata(path).map_or(0, |metadata| metadata.len())).sum()
}

fn database() -> pg_sys::Oid {
    // SAFETY: set when the process connects to its database.
    unsafe { pg_sys::MyDatabaseId }
}

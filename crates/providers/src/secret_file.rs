//! Reading a small file that only the server's user may read.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use zeroize::Zeroizing;

/// No file of keys is longer.
const MAX_BYTES: u64 = 64 * 1024;

/// Why a file of keys is not read. The texts name no content.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// The system says no.
    #[error("could not be opened: {0}")]
    Open(std::io::Error),
    /// A directory, a pipe, a device.
    #[error("is not a regular file")]
    NotAFile,
    /// Another user owns it.
    #[error("is not owned by the server's user")]
    Owner,
    /// Group or others may do something with it.
    #[error("is accessible to group or others (mode {0:04o}); its mode must be 0600 or 0400")]
    Mode(u32),
    /// Too long for keys.
    #[error("is longer than 64 kB")]
    TooLong,
    /// Reading failed.
    #[error("could not be read: {0}")]
    Read(std::io::Error),
}

/// What tells whether a file has changed since it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStamp {
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    mode: u32,
}

/// The stamp of the file at `path` now; `None` when there is none.
pub fn stamp(path: &Path) -> Option<FileStamp> {
    let found = std::fs::metadata(path).ok()?;
    Some(FileStamp {
        inode: found.ino(),
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        changed: (found.ctime(), found.ctime_nsec()),
        mode: found.mode(),
    })
}

/// The content of a file of keys, which only its owner, the server's user, may access.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, SecretFileError> {
    // Non-blocking, because opening a pipe would otherwise wait for a writer and could not be cancelled.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(SecretFileError::Open)?;
    // Checks on the open file: its name could come to mean another file meanwhile.
    let found = file.metadata().map_err(SecretFileError::Read)?;
    if !found.is_file() {
        return Err(SecretFileError::NotAFile);
    }
    if found.uid() != rustix::process::geteuid().as_raw() {
        return Err(SecretFileError::Owner);
    }
    if found.mode() & 0o077 != 0 {
        return Err(SecretFileError::Mode(found.mode() & 0o7777));
    }
    if found.len() > MAX_BYTES {
        return Err(SecretFileError::TooLong);
    }
    // Capacity for all of it at once: growing would leave copies behind.
    let mut content = Zeroizing::new(Vec::with_capacity(found.len() as usize + 1));
    file.take(MAX_BYTES).read_to_end(&mut content).map_err(SecretFileError::Read)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, set_permissions, write};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_private_regular_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        assert!(matches!(read(&path), Err(SecretFileError::Open(_))));
        assert!(matches!(read(dir.path()), Err(SecretFileError::NotAFile)));
        write(&path, "content").unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(read(&path).is_ok(), good, "{mode:o}");
        }
    }

    #[test]
    fn a_pipe_does_not_hang_the_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RUSR).unwrap();
        assert!(matches!(read(&path), Err(SecretFileError::NotAFile)));
    }

    #[test]
    fn a_changed_file_has_another_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        assert_eq!(stamp(&path), None);
        write(&path, "one").unwrap();
        let first = stamp(&path);
        assert_eq!(stamp(&path), first);
        write(&path, "longer").unwrap();
        assert_ne!(stamp(&path), first);
    }
}

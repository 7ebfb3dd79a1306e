//! Who else could put another file in the place of a file of keys: looked at before anybody meets the consequences.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Entries may be moved and removed by their owners only.
const STICKY: u32 = 0o1000;

/// A directory on the way to a file in which somebody else could replace what the way leads through.
#[derive(Debug, PartialEq, Eq)]
pub struct OpenDirectory {
    /// The directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

/// The nearest directory, on the path as written or with its links followed, that others than root and the server's
/// user can change.
pub fn open_directory(path: &Path) -> Option<OpenDirectory> {
    let followed = path.parent().and_then(|directory| directory.canonicalize().ok());
    let target = path.canonicalize().ok();
    let written = path.ancestors().skip(1);
    let followed = followed.iter().flat_map(|directory| directory.ancestors());
    let target = target.iter().flat_map(|file| file.ancestors().skip(1));
    written.chain(followed).chain(target).find_map(|directory| {
        let why = why_open(directory)?;
        Some(OpenDirectory { path: directory.to_owned(), why })
    })
}

fn why_open(directory: &Path) -> Option<String> {
    let found = std::fs::metadata(directory).ok()?;
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != own {
        return Some("belongs to another user".to_owned());
    }
    let open = found.mode() & WRITABLE_BY_OTHERS != 0 && found.mode() & STICKY == 0;
    open.then(|| format!("is writable by group or others (mode {:04o})", found.mode() & 0o7777))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{Permissions, create_dir, set_permissions, write};
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn directories_that_others_can_write_are_found_on_the_way() {
        let dir = tempfile::tempdir().unwrap();
        let (open, inner) = (dir.path().join("open"), dir.path().join("open/inner"));
        create_dir(&open).unwrap();
        create_dir(&inner).unwrap();
        write(inner.join("kek"), "x").unwrap();
        symlink(inner.join("kek"), dir.path().join("link")).unwrap();
        for (mode, found) in [(0o755, false), (0o777, true), (0o775, true), (0o1777, false)] {
            set_permissions(&open, Permissions::from_mode(mode)).unwrap();
            for way in [inner.join("kek"), inner.join("missing"), dir.path().join("link")] {
                let seen = open_directory(&way);
                assert_eq!(seen.is_some(), found, "{mode:o} {way:?} {seen:?}");
                assert!(seen.is_none_or(|seen| seen.path == open));
            }
        }
    }
}

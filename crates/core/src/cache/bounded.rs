//! What is remembered by name: bounded in number and in bytes of names; the one unused for longest goes first.

use std::hash::BuildHasher;

use lru::{DefaultHasher, LruCache};

/// Longest header that is fetched ahead with many others. Whoever may write rows may write headers of a megabyte and a half: what
/// is bounded in number is bounded in bytes too, by this for each.
pub(crate) const MOST_HEAD_BYTES: usize = 16 * 1024;

/// Names that are few enough for one value to need them all, however long they are.
const FEW: usize = 1024;

/// Values by name.
pub(crate) struct Bounded<V, S = DefaultHasher> {
    entries: LruCache<Box<[u8]>, V, S>,
    /// Bytes of names.
    bytes: usize,
}

impl<V, S: BuildHasher + Default> Default for Bounded<V, S> {
    fn default() -> Self {
        Bounded { entries: LruCache::unbounded_with_hasher(S::default()), bytes: 0 }
    }
}

impl<V, S: BuildHasher> Bounded<V, S> {
    /// The value of that name, which counts as used now.
    #[inline]
    pub(crate) fn get(&mut self, name: &[u8]) -> Option<&mut V> {
        self.entries.get_mut(name)
    }

    /// The value of that name.
    pub(crate) fn peek(&self, name: &[u8]) -> Option<&V> {
        self.entries.peek(name)
    }

    /// What was used last.
    #[inline]
    pub(crate) fn latest(&self) -> Option<(&[u8], &V)> {
        self.entries.peek_mru().map(|(name, value)| (&**name, value))
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.iter().map(|(_, value)| value)
    }

    /// Drops a value; gives whether there was one.
    pub(crate) fn remove(&mut self, name: &[u8]) -> bool {
        let was_there = self.entries.pop(name).is_some();
        self.bytes -= if was_there { name.len() } else { 0 };
        was_there
    }

    /// Keeps a value, and of all no more than `most`. Gives what had to go.
    pub(crate) fn put(&mut self, name: Box<[u8]>, value: V, most: usize) -> Vec<V> {
        let length = name.len();
        if self.entries.put(name, value).is_none() {
            self.bytes += length;
        }
        self.evict(most)
    }

    /// Drops what is more than `most`, and too many bytes; one is kept however long its name is. Gives what had to go.
    pub(crate) fn evict(&mut self, most: usize) -> Vec<V> {
        let (most, most_bytes) = (most.max(1), most.max(FEW).saturating_mul(MOST_HEAD_BYTES));
        let mut gone = Vec::new();
        while self.len() > most || (self.bytes > most_bytes && self.len() > 1) {
            let Some((name, value)) = self.entries.pop_lru() else { break };
            self.bytes -= name.len();
            gone.push(value);
        }
        gone
    }

    /// Drops all other values.
    pub(crate) fn retain(&mut self, mut wanted: impl FnMut(&mut V) -> bool) {
        let bytes = &mut self.bytes;
        self.entries.retain(|name, value| {
            let keep = wanted(value);
            *bytes -= if keep { 0 } else { name.len() };
            keep
        });
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize, length: usize) -> Box<[u8]> {
        let mut name = vec![0; length];
        name[..8].copy_from_slice(&n.to_be_bytes());
        name.into()
    }

    #[test]
    fn number_and_bytes_are_bounded() {
        let mut kept = Bounded::<usize>::default();
        for n in 0..10 {
            let gone = kept.put(name(n, 100), n, 4);
            assert_eq!(gone, if n < 4 { vec![] } else { vec![n - 4] });
        }
        kept.get(&name(6, 100));
        assert_eq!(kept.put(name(10, 100), 10, 4), [7], "the one unused for longest");
        // Names of a megabyte: as many as many short ones would take.
        for n in 0..100 {
            kept.put(name(n, 1 << 20), n, 4000);
        }
        assert_eq!((kept.len(), kept.bytes), (62, 62 << 20));
        assert_eq!(kept.evict(1).len(), 61);
        assert_eq!(kept.evict(0).len(), 0, "one is kept");
        kept.put(name(1, 100 << 20), 1, 4);
        assert_eq!((kept.len(), kept.bytes), (1, 100 << 20), "however long its name is");
        kept.put(name(1, 100 << 20), 2, 4);
        assert_eq!((kept.len(), kept.bytes), (1, 100 << 20));
        kept.retain(|value| *value != 2);
        assert_eq!((kept.len(), kept.bytes), (0, 0));
        kept.put(name(1, 50), 1, 4);
        assert!(kept.remove(&name(1, 50)) && !kept.remove(&name(1, 50)));
        assert_eq!((kept.len(), kept.bytes), (0, 0));
    }
}

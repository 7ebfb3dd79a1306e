//! What a role may do with each key.

use std::collections::BTreeMap;

/// What a role may do with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Privilege {
    /// Make values under it.
    Encrypt,
    /// See the plaintext of values under it.
    Decrypt,
    /// Move values to it or from it, unseen.
    Rewrap,
}

impl Privilege {
    /// All of them.
    pub const ALL: [Privilege; 3] = [Privilege::Encrypt, Privilege::Decrypt, Privilege::Rewrap];

    /// The privilege of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|privilege| privilege.name() == name)
    }

    /// Its name in the catalog and in the audit.
    pub fn name(self) -> &'static str {
        match self {
            Privilege::Encrypt => "encrypt",
            Privilege::Decrypt => "decrypt",
            Privilege::Rewrap => "rewrap",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What one caller may do with each key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rights {
    all: bool,
    by_key: BTreeMap<String, u8>,
}

impl Rights {
    /// Everything with every key.
    pub fn all() -> Self {
        Rights { all: true, by_key: BTreeMap::new() }
    }

    /// Adds one privilege.
    pub fn grant(&mut self, key: &str, privilege: Privilege) {
        *self.by_key.entry(key.to_owned()).or_default() |= privilege.bit();
    }

    /// What both may do.
    pub fn meet(&self, other: &Rights) -> Rights {
        match (self.all, other.all) {
            (true, _) => other.clone(),
            (_, true) => self.clone(),
            _ => {
                let both = |(key, own): (&String, &u8)| {
                    let common = own & other.by_key.get(key)?;
                    (common != 0).then(|| (key.clone(), common))
                };
                Rights { all: false, by_key: self.by_key.iter().filter_map(both).collect() }
            }
        }
    }

    /// Whether the caller has the privilege on the key.
    pub fn allow(&self, privilege: Privilege, key: &str) -> bool {
        self.all || self.by_key.get(key).is_some_and(|bits| bits & privilege.bit() != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(pairs: &[(&str, Privilege)]) -> Rights {
        let mut rights = Rights::default();
        pairs.iter().for_each(|(key, privilege)| rights.grant(key, *privilege));
        rights
    }

    #[test]
    fn two_callers_may_what_both_may() {
        let one = granted(&[("a", Privilege::Decrypt), ("a", Privilege::Encrypt), ("b", Privilege::Decrypt)]);
        let two = granted(&[("a", Privilege::Decrypt), ("c", Privilege::Decrypt)]);
        let both = one.meet(&two);
        assert!(both.allow(Privilege::Decrypt, "a"));
        for (privilege, key) in [(Privilege::Encrypt, "a"), (Privilege::Decrypt, "b"), (Privilege::Decrypt, "c")] {
            assert!(!both.allow(privilege, key), "{privilege:?} {key}");
        }
        assert_eq!(one.meet(&Rights::all()), one);
        assert_eq!(Rights::all().meet(&one), one);
        assert!(!Rights::default().allow(Privilege::Decrypt, ""));
    }
}

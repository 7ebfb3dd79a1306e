//! Runs one operation so many times, for a tool that counts instructions: `instructions OPERATION TIMES`. Two runs with
//! different counts differ by what the values between them take. `tests/bench/instructions.py` does that.
#![allow(missing_docs)]

mod session;

use std::hint::black_box;

use session::{Bench, plaintext};
use vod_tender_core::stored::Kind;

/// A token.
const SIZE: usize = 200;
const DEKS: usize = 1000;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [operation, times] = arguments.as_slice() else {
        // `cargo bench` without arguments of one's own: there is nothing to time.
        return;
    };
    let times = times.parse().expect("TIMES is a number");
    match operation.as_str() {
        "decrypt_bytea" => decrypt(Kind::Bytes, 1, times),
        "decrypt_text" => decrypt(Kind::Text, 1, times),
        "decrypt_bytea_1000_deks" => decrypt(Kind::Bytes, DEKS, times),
        "decrypt_text_1000_deks" => decrypt(Kind::Text, DEKS, times),
        "encrypt_bytea" => encrypt(Kind::Bytes, times),
        "encrypt_text" => encrypt(Kind::Text, times),
        _ => panic!("no such operation: {operation}"),
    }
}

fn decrypt(kind: Kind, deks: usize, times: usize) {
    // As many whatever `times` is, so that they cancel out.
    let (mut bench, stored) = Bench::stored(kind, SIZE, DEKS, deks);
    for value in stored.iter().cycle().take(times) {
        black_box(bench.decrypt(value.as_value()));
    }
}

fn encrypt(kind: Kind, times: usize) {
    let mut bench = Bench::new(u64::MAX);
    let value = plaintext(kind, SIZE);
    for _ in 0..times {
        black_box(bench.encrypt(value.as_value()));
    }
}

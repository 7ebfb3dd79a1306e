//! What asking for the caller's right and counting the use costs for each value. Prints nanoseconds.
#![allow(clippy::print_stdout, missing_docs)]

use std::hint::black_box;
use std::rc::Rc;
use std::time::Instant;

use vod_tender_core::access::{Function, Gate, Privilege, Rights, Seen};
use vod_tender_core::context::Context;

fn main() {
    const ROUNDS: usize = 9;
    const VALUES: u32 = 2_000_000;
    let mut rights = Rights::default();
    rights.grant("default", Privilege::Decrypt);
    let mut gate = Gate::new(Box::new(()));
    gate.enter(0, Rc::new(rights));
    let (seen, context) = (Seen::default(), Context::empty());
    let mut nanoseconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            for _ in 0..VALUES {
                gate.begin(black_box(Function::Decrypt));
                let admitted = gate.admit(black_box(&seen), Privilege::Decrypt, "default", &context);
                gate.done(admitted.expect("it is granted"));
            }
            began.elapsed().as_nanos() as f64 / f64::from(VALUES)
        })
        .collect();
    nanoseconds.sort_by(f64::total_cmp);
    println!("gate {:.2} ns", nanoseconds[ROUNDS / 2]);
}

//! What a value costs in the core, by operation, type, size and number of DEKs; PostgreSQL comes on top.
#![allow(missing_docs)]

mod session;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use session::{Bench, plaintext};
use vod_tender_core::stored::Kind;

const SIZES: [usize; 4] = [64, 200, 1024, 16384];
const KINDS: [(&str, Kind); 2] = [("bytea", Kind::Bytes), ("text", Kind::Text)];
const DEKS: [usize; 2] = [1, 1000];

fn decrypt(criterion: &mut Criterion) {
    for (name, kind) in KINDS {
        for deks in DEKS {
            let mut group = criterion.benchmark_group(format!("decrypt {name} {deks}"));
            for size in SIZES {
                let (mut bench, stored) = Bench::stored(kind, size, 1000, deks);
                let mut values = stored.iter().cycle();
                group.throughput(Throughput::Bytes(size as u64));
                group.bench_function(BenchmarkId::from_parameter(size), |timer| {
                    timer.iter(|| black_box(bench.decrypt(values.next().expect("it goes round").as_value())).len());
                });
            }
            group.finish();
        }
    }
}

fn encrypt(criterion: &mut Criterion) {
    for (name, kind) in KINDS {
        let mut group = criterion.benchmark_group(format!("encrypt {name} 1"));
        for size in SIZES {
            let (mut bench, value) = (Bench::new(u64::MAX), plaintext(kind, size));
            group.throughput(Throughput::Bytes(size as u64));
            group.bench_function(BenchmarkId::from_parameter(size), |timer| {
                timer.iter(|| black_box(bench.encrypt(value.as_value())).len());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, decrypt, encrypt);
criterion_main!(benches);

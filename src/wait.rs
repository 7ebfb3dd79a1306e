//! Waiting for a key service, in a way that every signal of PostgreSQL's can end.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use vod_tender_core::provider::{Fault, ProviderError, ProviderFuture, Wait};
use vod_tender_secret_memory::burn_stack;

use crate::process::{self, WaitEvent};
use crate::signals::{self, Blocked};

/// How often a wait looks for interrupts. A cancel must take effect within 100 ms.
const TICK: Duration = Duration::from_millis(20);

/// Threads for name resolution, which the system offers only as a call that blocks.
const RESOLVER_THREADS: usize = 4;

/// Runs calls on one current-thread runtime, made on first use.
#[derive(Default)]
pub struct Waiter {
    runtime: Option<Runtime>,
}

impl Waiter {
    /// Ends the runtime and with it every connection.
    pub fn forget(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            let _blocked = Blocked::begin();
            runtime.shutdown_background();
        }
    }

    fn runtime(&mut self) -> Result<&Runtime, ProviderError> {
        if self.runtime.is_none() {
            let made = Builder::new_current_thread()
                .enable_io()
                .enable_time()
                .max_blocking_threads(RESOLVER_THREADS)
                .on_thread_park(signals::before_sleep)
                .on_thread_unpark(signals::after_sleep)
                .build();
            let failed = |error| ProviderError::new(Fault::Unreachable, format!("no async runtime: {error}"));
            self.runtime = Some(made.map_err(failed)?);
        }
        Ok(self.runtime.as_ref().expect("it was just made"))
    }
}

impl Wait for Waiter {
    fn wait<T>(&mut self, future: ProviderFuture<'_, T>) -> Result<T, ProviderError> {
        let runtime = self.runtime()?;
        let event = WaitEvent::begin();
        let mut future = Some(future);
        while let Some(running) = &mut future {
            let blocked = Blocked::begin();
            let result = runtime.block_on(until_interrupted(running.as_mut()));
            drop(blocked);
            if let Some(result) = result {
                drop(future);
                burn_stack();
                return result;
            }
            if process::will_be_interrupted() {
                // The call ends before PostgreSQL raises: ending the session would not run destructors.
                future = None;
            }
            process::process_interrupts();
        }
        drop(event);
        Err(ProviderError::new(Fault::Unreachable, "the call was interrupted"))
    }
}

/// The future's result, or nothing as soon as PostgreSQL has an interrupt to process.
async fn until_interrupted<T>(mut future: Pin<&mut (dyn Future<Output = T> + '_)>) -> Option<T> {
    loop {
        if process::interrupts_pending() {
            return None;
        }
        if let Ok(result) = tokio::time::timeout(TICK, future.as_mut()).await {
            return Some(result);
        }
    }
}

//! What a job does with each value, as its statements say it.

use std::cell::RefCell;
use std::rc::Rc;

use vod_tender_core::context::Context;
use vod_tender_core::session::{BulkOperation, BulkTask};

use crate::arguments::TextIn;
use crate::errors::invalid;

/// What a job does, as its statements say it: one argument that is the same for every value, so that it is read once.
/// A JSON object as the function `job_task` of `sql/job_plan.sql` makes it.
pub struct Task {
    text: String,
    pub operation: BulkOperation,
    pub key: Option<String>,
    pub newest_kek_id: Option<String>,
    context: Option<Context>,
    check_wraps: bool,
    pub aad_given: bool,
}

thread_local! {
    /// The tasks that were read last. They hold no secret.
    static TASKS: RefCell<Vec<Rc<Task>>> = const { RefCell::new(Vec::new()) };
}

impl Task {
    /// The task of this text, read once for many values.
    pub fn of(text: &TextIn<'_>) -> Rc<Task> {
        const KEPT: usize = 8;
        let text = text.as_str();
        TASKS.with_borrow_mut(|tasks| {
            if let Some(task) = tasks.iter().find(|task| task.text == text) {
                return Rc::clone(task);
            }
            let Some(task) = Task::parse(text).map(Rc::new) else { invalid("not the task of a job", "Jobs make it.") };
            if tasks.len() == KEPT {
                tasks.remove(0);
            }
            tasks.push(Rc::clone(&task));
            task
        })
    }

    fn parse(text: &str) -> Option<Task> {
        let json: serde_json::Value = serde_json::from_str(text).ok()?;
        let string = |name: &str| json.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
        let flag = |name: &str| json.get(name).and_then(serde_json::Value::as_bool);
        let context = match json.get("context") {
            None | Some(serde_json::Value::Null) => None,
            Some(context) => Some(Context::from_json(&context.to_string()).ok()?),
        };
        Some(Task {
            text: text.to_owned(),
            operation: BulkOperation::from_name(&string("operation")?)?,
            key: string("key"),
            newest_kek_id: string("newest_kek_id"),
            context,
            check_wraps: flag("check_wraps")?,
            aad_given: flag("aad_given")?,
        })
    }

    /// As the core wants it.
    pub fn bulk(&self) -> BulkTask<'_> {
        BulkTask {
            operation: self.operation,
            key: self.key.as_deref(),
            context: self.context.as_ref(),
            check_wraps: self.check_wraps,
        }
    }
}

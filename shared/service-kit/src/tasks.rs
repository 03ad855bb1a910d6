//! Watches the tasks that live as long as the process, each by a name. A task that panics, or ends before its shutdown, is
//! logged and makes the process stop with an error. Tasks of one request or one connection are not watched.

use std::{any::Any, borrow::Cow, panic::AssertUnwindSafe};

use futures_util::FutureExt;
use thiserror::Error;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("task {task} {outcome}")]
pub struct TaskFailure {
    pub task: Cow<'static, str>,
    pub outcome: String,
}

#[derive(Clone, Default)]
pub struct Tasks {
    failure: watch::Sender<Option<TaskFailure>>,
}

impl Tasks {
    /// Runs `future` on the runtime as [`Self::watch`] does.
    #[expect(clippy::disallowed_methods, reason = "it is watched")]
    pub fn spawn(
        &self,
        task: impl Into<Cow<'static, str>>,
        stop: &CancellationToken,
        future: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let task: Cow<'static, str> = task.into();
        tokio::spawn(self.watch(task, stop, future))
    }

    /// A future that never panics and reports how `future` ended, unless it ended regularly after `stop` was cancelled.
    pub fn watch<N: Into<Cow<'static, str>>, F: Future<Output = ()>>(
        &self,
        task: N,
        stop: &CancellationToken,
        future: F,
    ) -> impl Future<Output = ()> + use<N, F> {
        let (tasks, task, stop) = (self.clone(), task.into(), stop.clone());
        async move {
            match AssertUnwindSafe(future).catch_unwind().await {
                Ok(()) if stop.is_cancelled() => {}
                Ok(()) => tasks.fail(task, "ended before its shutdown".into()),
                Err(panic) => tasks.fail(task, format!("panicked: {}", message_of(&*panic))),
            }
        }
    }

    /// The first failure, if there was one. From then on the process is not ready.
    pub fn failure(&self) -> Option<TaskFailure> {
        self.failure.borrow().clone()
    }

    pub async fn failed(&self) -> TaskFailure {
        let mut failure = self.failure.subscribe();
        let failed = failure.wait_for(Option::is_some).await.expect("this sender lives");
        failed.clone().expect("it was waited for")
    }

    fn fail(&self, task: Cow<'static, str>, outcome: String) {
        tracing::error!(%task, outcome, "task failed; the process stops");
        self.failure.send_if_modified(|first| {
            let is_first = first.is_none();
            first.get_or_insert(TaskFailure { task, outcome });
            is_first
        });
    }
}

/// Tasks of the process that stop together. Dropping the stage stops them, too.
pub struct Stage {
    tasks: Tasks,
    stop: CancellationToken,
    running: TaskTracker,
}

impl Stage {
    pub fn new(tasks: &Tasks) -> Self {
        Self::stopped_by(tasks, CancellationToken::new())
    }

    pub fn stopped_by(tasks: &Tasks, stop: CancellationToken) -> Self {
        Self { tasks: tasks.clone(), stop, running: TaskTracker::new() }
    }

    /// Runs a task with a token that is cancelled when the task must stop.
    #[expect(clippy::disallowed_methods, reason = "it is watched")]
    pub fn spawn<F: Future<Output = ()> + Send + 'static>(
        &self,
        task: impl Into<Cow<'static, str>>,
        run: impl FnOnce(CancellationToken) -> F,
    ) {
        let task: Cow<'static, str> = task.into();
        self.running.spawn(self.tasks.watch(task, &self.stop, run(self.stop.clone())));
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.running.close();
        self.running.wait().await;
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use std::{
        future::pending,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_fails_the_process_by_name() {
        let (tasks, stop) = (Tasks::default(), CancellationToken::new());
        let watched = tasks.spawn(format!("listener {}", 1), &stop, async { panic!("boom") });
        let failure = tasks.failed().await;
        assert_eq!(failure.to_string(), "task listener 1 panicked: boom");
        assert_eq!(tasks.failure(), Some(failure));
        watched.await.unwrap();
    }

    #[tokio::test]
    async fn a_task_that_ends_early_fails_the_process() {
        let (tasks, stop) = (Tasks::default(), CancellationToken::new());
        tasks.spawn("pruner", &stop, async {}).await.unwrap();
        // The first failure is the cause; what fails later is its consequence.
        tasks.spawn("publisher", &stop, async { panic!("gone") }).await.unwrap();
        assert_eq!(tasks.failed().await.task, "pruner");
    }

    #[tokio::test]
    async fn stopped_task_may_end_but_not_panic() {
        let (tasks, stop) = (Tasks::default(), CancellationToken::new());
        let until_stopped = tasks.spawn("regular", &stop, stop.clone().cancelled_owned());
        stop.cancel();
        until_stopped.await.unwrap();
        assert_eq!(tasks.failure(), None);
        tasks.spawn("late", &stop, async { panic!("at the end") }).await.unwrap();
        assert_eq!(tasks.failed().await.task, "late");
    }

    #[tokio::test]
    async fn stage_stops_its_tasks_and_waits_for_them() {
        let (tasks, ended) = (Tasks::default(), Arc::new(AtomicUsize::new(0)));
        let stage = Stage::new(&tasks);
        for _ in 0..2 {
            let ended = ended.clone();
            stage.spawn("regular", async move |stop: CancellationToken| {
                stop.cancelled().await;
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }
        stage.stop().await;
        assert_eq!((ended.load(Ordering::Relaxed), tasks.failure()), (2, None));
        let stop = CancellationToken::new();
        drop(Stage::stopped_by(&tasks, stop.clone()));
        assert!(stop.is_cancelled(), "a dropped stage stops");
    }

    #[tokio::test]
    async fn a_task_that_is_dropped_is_no_failure() {
        let (tasks, stop) = (Tasks::default(), CancellationToken::new());
        drop(tasks.watch("never polled", &stop, pending()));
        let aborted = tasks.spawn("aborted", &stop, pending());
        aborted.abort();
        assert!(aborted.await.unwrap_err().is_cancelled());
        assert_eq!(tasks.failure(), None);
    }
}

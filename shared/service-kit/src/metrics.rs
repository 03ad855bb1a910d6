//! Metrics are declared once: a row is a field, its metric, its name in `/metrics` and its help, and docs/metrics.md is made from it.

use std::hash::Hash;

use prometheus_client::{
    metrics::{
        TypedMetric,
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use crate::process_metrics;

/// Declares a struct of metrics. A row `name: Type = "help";` is a metric of that name (counters end in `_total` when they are encoded);
/// `, value` after the help gives another initial value than the default. A row `name: Type;` is a group with its own `register`.
#[macro_export]
macro_rules! metrics {
    ($(#[$doc:meta])* $vis:vis struct $Metrics:ident {
        $($field_vis:vis $field:ident: $type:ty $(= $help:literal $(, $initial:expr)?)?;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone)]
        $vis struct $Metrics {
            $($field_vis $field: $type,)*
        }

        impl $Metrics {
            pub fn register(registry: &mut ::prometheus_client::registry::Registry) -> Self {
                Self { $($field: $crate::metrics!(@register registry, $field, $type $(= $help $(, $initial)?)?),)* }
            }
        }

        /// Counts, and no registry encodes it.
        impl Default for $Metrics {
            fn default() -> Self {
                Self::register(&mut ::prometheus_client::registry::Registry::default())
            }
        }

        impl $crate::metrics::Sample for $Metrics {
            fn sample(&self) {
                $($crate::metrics::Sample::sample(&self.$field);)*
            }
        }
    };
    (@register $registry:ident, $field:ident, $type:ty) => {
        <$type>::register($registry)
    };
    (@register $registry:ident, $field:ident, $type:ty = $help:literal) => {
        $crate::metrics!(@register $registry, $field, $type = $help, <$type>::default())
    };
    (@register $registry:ident, $field:ident, $type:ty = $help:literal, $initial:expr) => {{
        let metric: $type = $initial;
        $registry.register(stringify!($field), $help, metric.clone());
        metric
    }};
}

/// Declares a set of labels: `labels!(Reason { reason });`.
#[macro_export]
macro_rules! labels {
    ($(#[$doc:meta])* $vis:vis $Labels:ident { $($label:ident),+ }) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Default, PartialEq, Eq, Hash, ::prometheus_client::encoding::EncodeLabelSet,
        )]
        $vis struct $Labels {
            $(pub $label: &'static str,)+
        }
    };
}

/// Makes every metric visible, those with labels by one sample: a family without samples is not encoded. For documentation and
/// tests.
pub trait Sample {
    fn sample(&self);
}

impl<S: Clone + Hash + Eq + Default, M: TypedMetric + Clone, C: MetricConstructor<M>> Sample
    for Family<S, M, C>
{
    fn sample(&self) {
        self.get_or_create_owned(&S::default());
    }
}

macro_rules! visible {
    ($($metric:ty),*) => { $(impl Sample for $metric { fn sample(&self) {} })* };
}

visible!(Counter, Gauge, Histogram);

/// The metrics of a service and the registry that encodes them, with those of the process and the build.
pub fn of_service<M>(
    service: &'static str,
    version: &'static str,
    prefix: &str,
    register: impl FnOnce(&mut Registry) -> M,
) -> (M, Registry) {
    let mut registry = Registry::default();
    process_metrics::register(&mut registry, service, version);
    let metrics = register(registry.sub_registry_with_prefix(prefix));
    (metrics, registry)
}

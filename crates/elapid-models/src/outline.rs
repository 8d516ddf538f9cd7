//! What parameters a model of a configuration has, told without building one: files are checked against this
//! before any memory is taken for weights.

use elapid_tensor::Shape;

use crate::{Kind, MambaConfig, NormKind};

/// Name, shape and kind of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterOutline {
    /// Full name, as [`crate::LanguageModel::visit`] gives it.
    pub name: String,
    /// Its shape in the model.
    pub shape: Shape,
    /// What it is.
    pub kind: Kind,
}

/// Every parameter of a model of that configuration, in the order of [`crate::LanguageModel::visit`].
/// The configuration must be valid.
pub fn parameter_outlines(config: &MambaConfig) -> impl Iterator<Item = ParameterOutline> {
    let rows = Shape::new(&[config.padded_vocab_size(), config.d_model]);
    let outline = |name: &str, shape, kind| ParameterOutline { name: name.into(), shape, kind };
    let embedding = outline("backbone.embeddings.weight", rows, Kind::Embedding);
    let head = (!config.tie_embeddings).then(|| outline("lm_head.weight", rows, Kind::Projection));
    let layer = layer(config);
    let layers = (0..config.n_layer).flat_map(move |i| {
        let prefix = format!("backbone.layers.{i}.");
        layer.clone().into_iter().map(move |(name, shape, kind)| ParameterOutline {
            name: format!("{prefix}{name}"),
            shape,
            kind,
        })
    });
    let norm_f: Vec<_> = norm(config, "backbone.norm_f.weight", "backbone.norm_f.bias")
        .into_iter()
        .map(|(name, shape, kind)| outline(name, shape, kind))
        .collect();
    std::iter::once(embedding).chain(layers).chain(norm_f).chain(head)
}

type Item = (&'static str, Shape, Kind);

fn norm(config: &MambaConfig, weight: &'static str, bias: &'static str) -> Vec<Item> {
    let shape = Shape::new(&[config.d_model]);
    let mut items = vec![(weight, shape, Kind::Scale)];
    if config.norm == NormKind::Layer {
        items.push((bias, shape, Kind::Bias));
    }
    items
}

fn layer(config: &MambaConfig) -> Vec<Item> {
    let (d, e, n, w, r) =
        (config.d_model, config.d_inner(), config.d_state, config.d_conv, config.dt_rank());
    let mut items = norm(config, "norm.weight", "norm.bias");
    let mut add = |name, dims: &[usize], kind| items.push((name, Shape::new(dims), kind));
    add("mixer.A_log", &[e, n], Kind::Recurrence);
    add("mixer.D", &[e], Kind::Skip);
    add("mixer.in_proj.weight", &[2 * e, d], Kind::Projection);
    if config.bias {
        add("mixer.in_proj.bias", &[2 * e], Kind::Bias);
    }
    add("mixer.conv1d.weight", &[e, w], Kind::Convolution);
    if config.conv_bias {
        add("mixer.conv1d.bias", &[e], Kind::Bias);
    }
    add("mixer.x_proj.weight", &[r + 2 * n, e], Kind::Projection);
    add("mixer.dt_proj.weight", &[e, r], Kind::DeltaProjection);
    add("mixer.dt_proj.bias", &[e], Kind::DeltaProjection);
    add("mixer.out_proj.weight", &[d, e], Kind::Projection);
    if config.bias {
        add("mixer.out_proj.bias", &[d], Kind::Bias);
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LanguageModel;

    #[test]
    fn outlines_are_what_a_model_shows() {
        let base = MambaConfig { d_state: 3, d_conv: 2, ..MambaConfig::bytes(8, 2) };
        let configs = [
            base.clone(),
            MambaConfig { bias: true, conv_bias: false, tie_embeddings: false, ..base.clone() },
            MambaConfig { norm: NormKind::Layer, dt_rank: Some(5), expand: 3, ..base },
        ];
        for config in configs {
            let mut shown = Vec::new();
            LanguageModel::empty(&config)
                .unwrap()
                .visit(&mut |parameter| {
                    shown.push(ParameterOutline {
                        name: parameter.name,
                        shape: parameter.tensor.shape(),
                        kind: parameter.kind,
                    });
                    Ok(())
                })
                .unwrap();
            assert_eq!(parameter_outlines(&config).collect::<Vec<_>>(), shown);
            let elements: usize = shown.iter().map(|outline| outline.shape.elements()).sum();
            assert_eq!(elements, config.parameter_count());
        }
    }
}

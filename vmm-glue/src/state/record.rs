//! KVM's structures, field by field: one list for both writing and reading.

use kvm_bindings::{
    kvm_debugregs, kvm_dtable, kvm_mp_state, kvm_pit_channel_state, kvm_pit_state2, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1 as Exception, kvm_vcpu_events__bindgen_ty_2 as Interrupt,
    kvm_vcpu_events__bindgen_ty_3 as Nmi, kvm_vcpu_events__bindgen_ty_4 as Smi,
    kvm_vcpu_events__bindgen_ty_5 as TripleFault,
};
use vmstate::{StructBuilder, Value};

use super::StateError;

/// A structure that can be written as a described one, and read again.
pub(super) trait Record: Sized {
    /// The name of its description.
    const NAME: &'static str;
    fn write(&self, to: StructBuilder) -> StructBuilder;
    fn read(from: &Value<'_>) -> Result<Self, StateError>;
}

/// A field of a record.
pub(super) trait Field: Sized {
    fn put(&self, name: &str, to: StructBuilder) -> StructBuilder;
    fn take(from: &Value<'_>) -> Result<Self, StateError>;
}

fn unfit(from: &Value<'_>) -> StateError {
    StateError::Invalid(format!("\"{}\" at offset {} is out of range", from.name, from.range.start))
}

macro_rules! integer_fields {
    ($($method:ident: $type:ty, $read:ident;)*) => {$(
        impl Field for $type {
            fn put(&self, name: &str, to: StructBuilder) -> StructBuilder {
                to.$method(name, *self)
            }
            fn take(from: &Value<'_>) -> Result<Self, StateError> {
                <$type>::try_from(from.$read()?).map_err(|_| unfit(from))
            }
        }
    )*};
}

integer_fields! {
    u8: u8, as_u64;
    u16: u16, as_u64;
    u32: u32, as_u64;
    u64: u64, as_u64;
    i64: i64, as_i64;
}

impl<const N: usize> Field for [u64; N] {
    fn put(&self, name: &str, to: StructBuilder) -> StructBuilder {
        to.u64s(name, self)
    }
    fn take(from: &Value<'_>) -> Result<Self, StateError> {
        from.as_u64s()?.try_into().map_err(|_| unfit(from))
    }
}

/// Described once, however many there are: a restore waits until the description is read.
impl<T: Record, const N: usize> Field for [T; N] {
    fn put(&self, name: &str, to: StructBuilder) -> StructBuilder {
        to.structures(name, T::NAME, 1, self, |to, one| one.write(to))
    }
    fn take(from: &Value<'_>) -> Result<Self, StateError> {
        let all: Vec<T> = from.members().iter().map(T::read).collect::<Result<_, _>>()?;
        all.try_into().map_err(|_| unfit(from))
    }
}

impl<T: Record> Field for T {
    fn put(&self, name: &str, to: StructBuilder) -> StructBuilder {
        to.structure(name, T::NAME, 1, |inner| self.write(inner))
    }
    fn take(from: &Value<'_>) -> Result<Self, StateError> {
        T::read(from)
    }
}

macro_rules! records {
    ($($type:ident as $name:literal { $($field:ident),* $(,)? })*) => {$(
        impl Record for $type {
            const NAME: &'static str = $name;
            fn write(&self, to: StructBuilder) -> StructBuilder {
                $(let to = self.$field.put(stringify!($field), to);)*
                to
            }
            fn read(from: &Value<'_>) -> Result<Self, StateError> {
                let mut record = $type::default();
                $(record.$field = Field::take(from.field(stringify!($field))?)?;)*
                Ok(record)
            }
        }
    )*};
}

records! {
    kvm_regs as "kvm-regs" {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    }
    kvm_segment as "kvm-segment" { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable }
    kvm_dtable as "kvm-dtable" { base, limit }
    kvm_debugregs as "kvm-debugregs" { db, dr6, dr7, flags }
    kvm_mp_state as "kvm-mp-state" { mp_state }
    Exception as "kvm-events-exception" { injected, nr, has_error_code, pending, error_code }
    Interrupt as "kvm-events-interrupt" { injected, nr, soft, shadow }
    Nmi as "kvm-events-nmi" { injected, pending, masked }
    Smi as "kvm-events-smi" { smm, pending, smm_inside_nmi, latched_init }
    TripleFault as "kvm-events-triple-fault" { pending }
    kvm_vcpu_events as "kvm-vcpu-events" {
        exception, interrupt, nmi, sipi_vector, flags, smi, triple_fault, exception_has_payload, exception_payload,
    }
    kvm_pit_channel_state as "kvm-pit-channel" {
        count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode,
        mode, bcd, gate, count_load_time,
    }
}

impl Record for kvm_sregs {
    const NAME: &'static str = "kvm-sregs";
    fn write(&self, to: StructBuilder) -> StructBuilder {
        let &kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, .. } = self;
        let to = [cs, ds, es, fs, gs, ss, tr, ldt].put("cs_ds_es_fs_gs_ss_tr_ldt", to);
        let to = [gdt, idt].put("gdt_idt", to);
        let to = to.u64("cr0", cr0).u64("cr2", cr2).u64("cr3", cr3).u64("cr4", cr4).u64("cr8", cr8);
        let to = to.u64("efer", self.efer).u64("apic_base", self.apic_base);
        to.u64s("interrupt_bitmap", &self.interrupt_bitmap)
    }
    fn read(from: &Value<'_>) -> Result<Self, StateError> {
        let [cs, ds, es, fs, gs, ss, tr, ldt] = Field::take(from.field("cs_ds_es_fs_gs_ss_tr_ldt")?)?;
        let [gdt, idt] = Field::take(from.field("gdt_idt")?)?;
        let number = |name| u64::take(from.field(name)?);
        Ok(kvm_sregs {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0: number("cr0")?,
            cr2: number("cr2")?,
            cr3: number("cr3")?,
            cr4: number("cr4")?,
            cr8: number("cr8")?,
            efer: number("efer")?,
            apic_base: number("apic_base")?,
            interrupt_bitmap: Field::take(from.field("interrupt_bitmap")?)?,
        })
    }
}

impl Record for kvm_pit_state2 {
    const NAME: &'static str = "kvm-pit";
    fn write(&self, to: StructBuilder) -> StructBuilder {
        self.channels.put("channels", to).u32("flags", self.flags)
    }
    fn read(from: &Value<'_>) -> Result<Self, StateError> {
        let channels = Field::take(from.field("channels")?)?;
        Ok(kvm_pit_state2 { channels, flags: from.field("flags")?.as_u32()?, ..kvm_pit_state2::default() })
    }
}

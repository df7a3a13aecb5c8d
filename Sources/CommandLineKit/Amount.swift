/// Quantities for people: three digits and a unit.
public enum Amount {
    /// Memory, in powers of 1024: `512 MiB`, `1.5 GiB`, `4 KiB`.
    public static func memory(_ bytes: UInt64) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
        var value = Double(bytes)
        var unit = 0
        while value >= 1023.5, unit < units.count - 1 {
            value /= 1024
            unit += 1
        }
        return "\(threeDigits(value)) \(units[unit])"
    }

    /// Bytes per second, in powers of 1000: `1.84 GB/s`.
    public static func rate(_ bytesPerSecond: Double) -> String {
        let units = ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"]
        var value = max(0, bytesPerSecond)
        var unit = 0
        while value >= 999.5, unit < units.count - 1 {
            value /= 1000
            unit += 1
        }
        return "\(threeDigits(value)) \(units[unit])"
    }

    /// A length of time: `850 us`, `3.41 ms`, `2.5 s`, `3 min 20 s`.
    public static func time(nanoseconds: UInt64) -> String {
        let value = Double(nanoseconds)
        switch value {
        case 0: return "0 ms"
        case ..<999.5: return "\(nanoseconds) ns"
        case ..<999_500: return "\(threeDigits(value / 1000)) us"
        case ..<999_500_000: return "\(threeDigits(value / 1_000_000)) ms"
        case ..<119_500_000_000: return "\(threeDigits(value / 1_000_000_000)) s"
        default:
            let seconds = (nanoseconds + 500_000_000) / 1_000_000_000
            return seconds < 7200
                ? "\(seconds / 60) min \(seconds % 60) s" : "\(seconds / 3600) h \(seconds % 3600 / 60) min"
        }
    }

    /// A fixed number of digits behind the point, rounded to nearest.
    public static func decimal(_ value: Double, digits: Int) -> String {
        guard value.isFinite, abs(value) < 1e15 else { return "?" }
        let scale = (0..<digits).reduce(1.0) { power, _ in power * 10 }
        let scaled = Int64((abs(value) * scale).rounded())
        let whole = scaled / Int64(scale)
        let sign = value < 0 && scaled > 0 ? "-" : ""
        guard digits > 0 else { return "\(sign)\(whole)" }
        let part = String(scaled % Int64(scale))
        return "\(sign)\(whole)." + String(repeating: "0", count: digits - part.count) + part
    }

    private static func threeDigits(_ value: Double) -> String {
        let digits = value < 9.995 ? 2 : value < 99.95 ? 1 : 0
        let text = decimal(value, digits: digits)
        guard digits > 0 else { return text }
        let trimmed = text.reversed().drop { $0 == "0" }.drop { $0 == "." }
        return String(trimmed.reversed())
    }
}
